"""The application: llama-cpp-python's own routes, a proxy that gives them our model, and a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp.server.app as theirs
from fastapi import Depends, FastAPI
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse
from llama_cpp.server.errors import RouteErrorHandler
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ServerSettings
from starlette_context.middleware import RawContextMiddleware
from starlette_context.plugins import RequestIdPlugin

from chunkwise_lora.engines.llama_cpp.model import BASE
from chunkwise_lora.engines.llama_cpp.server.requests import ReadsAdapter, wanted
from chunkwise_lora.engines.llama_cpp.server.served import ServedLlama

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page may load: itself, and answers of this server."""


class AdapterProxy(LlamaProxy):
    """Gives the server's routes our model, which then follows the request of the task. They hold a lock meanwhile."""

    def __init__(self, llm: ServedLlama) -> None:
        self._llm = llm

    def __call__(self, model: str | None = None) -> ServedLlama:
        """Return the model. Its next calls run for the request of this task."""
        if (request := wanted.get(None)) is not None:  # other routes do not run the model
            self._llm.follow(request)
        return self._llm

    def __iter__(self) -> Iterator[str]:
        """Return the names that a request may give as `model`."""
        return iter([*self._llm.adapters, BASE])

    def free(self) -> None:
        """Free the model."""
        self._llm.close()


def create_app(llm: ServedLlama, *, host: str = "localhost", api_key: str | None = None) -> FastAPI:
    """Return the server of a model. It runs requests one after another; only one such server can be in a process.

    Args:
        llm: The model.
        host: Where it will listen. On a loopback address, it refuses requests to other host names, which a page in a
            browser could send.
        api_key: If given, requests must send it: `Authorization: Bearer <key>`.
    """
    theirs.set_server_settings(ServerSettings(host=host, api_key=api_key, interrupt_requests=False))
    theirs._llama_proxy = AdapterProxy(llm)
    app = FastAPI(title="chunkwise serve")
    app.add_middleware(ReadsAdapter, llm=llm, api_key=api_key)
    app.add_middleware(RawContextMiddleware, plugins=(RequestIdPlugin(),))
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    _add_routes(app)
    return app


def _add_routes(app: FastAPI) -> None:
    # Their routes leave out what OpenAI's answers do not have. These two come first, and leave nothing out.
    for path, endpoint in (
        ("/v1/completions", theirs.create_completion),
        ("/v1/chat/completions", theirs.create_chat_completion),
    ):
        app.router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=[Depends(theirs.authenticate)],
            response_model=None,
            route_class_override=RouteErrorHandler,
            include_in_schema=False,
        )
    app.include_router(theirs.router)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})
