"""Reads from a request to the server which adapter and settings it asks for, before the server reads it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from chunkwise_lora.engines.llama_cpp.model import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.session import Request
from chunkwise_lora.engines.requested_config import of_request
from chunkwise_lora.errors import ChunkWiseError, EngineError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
LARGEST_BODY = 16 * 2**20
"""Bytes of a request's body. A longer one is refused."""

wanted: ContextVar[Request] = ContextVar("wanted")
"""What the request of this task asks for."""


class ReadsAdapter:
    """ASGI middleware that sets `wanted`, and answers requests that cannot work with status 400 and the reason.

    Args:
        app: The server.
        llm: The model, whose adapters a request may name.
        api_key: A request without this key is left to the server, which refuses it.
    """

    def __init__(
        self, app: Callable[[Message, Receive, Send], Awaitable[None]], llm: ChunkWiseLlama, api_key: str | None
    ) -> None:
        self._app = app
        self._llm = llm
        self._authorization = None if api_key is None else f"Bearer {api_key}"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http" or scope["path"] not in PATHS or not self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        body = await _body_of(receive)
        if body is None:
            await _refusal(f"the request is longer than {LARGEST_BODY:,} bytes", 413)(scope, receive, send)
            return
        try:
            wanted.set(self._read(body))
        except ChunkWiseError as error:
            await _refusal(str(error), 400)(scope, receive, send)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, receive_again, send)

    def _is_allowed(self, scope: Message) -> bool:
        return self._authorization in (None, Headers(scope=scope).get("authorization"))

    def _read(self, body: bytes) -> Request:
        """Return what a body asks for.

        Raises:
            ChunkWiseError: It is not a JSON object, or its adapter or settings cannot work.
        """
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise EngineError("the body of the request is not a JSON object")
        model = fields.get("model") or self._llm.default_adapter
        if not isinstance(model, str):
            raise EngineError("model must be a string: the name of an adapter")
        return self._llm.request_alone(model, of_request(fields))


async def _body_of(receive: Receive) -> bytes | None:
    """Return the whole body of a request, or None if it is too long."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _refusal(reason: str, status: int) -> JSONResponse:
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)
