"""The model of the server: it follows the request that was read last, and its answers tell the rank that ran."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_cpp import llama_chat_format

from chunkwise_lora.engines.llama_cpp.model import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.session import Request
from chunkwise_lora.method.segments import ranks_of

KEY = "chunkwise"
"""The key of what an answer tells, beside OpenAI's own."""


class ServedLlama(ChunkWiseLlama):
    """A model whose completions and chats, and every piece of a stream, hold `"chunkwise"`.

    It holds the adapter's name, its full rank, the mean rank of all tokens so far and the rank of the newest token.
    """

    chat_handler: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        answer = self.chat_handler or self._chat_handlers.get(self.chat_format)
        self._answer_chat = answer or llama_chat_format.get_chat_completion_handler(self.chat_format)
        self.chat_handler = self._chat

    def _chat(self, **options: Any) -> Any:
        answer = self._answer_chat(**options)
        if isinstance(answer, Iterator):
            return map(self._told, answer)
        return self._told(answer)

    def create_completion(self, *arguments: Any, **options: Any) -> Any:
        """Complete a prompt like `ChunkWiseLlama.create_completion`."""
        answer = super().create_completion(*arguments, **options)
        if isinstance(answer, Iterator):
            return map(self._told, answer)
        return self._told(answer)

    __call__ = create_completion

    def follow(self, request: Request) -> None:
        """Run what is called from now on for a request."""
        self._request = request

    def _told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Add what ran to an answer or a piece of it."""
        running = self._session.first
        if running is not None and running.planner.tokens:
            adapter = running.request.adapter
            rank = ranks_of(running.planner.last_weights[None], adapter.rung_ranks)[0]
            answer[KEY] = {
                "adapter": adapter.name or None,
                "full_rank": round(float(adapter.rung_ranks[-1]), 3),
                "mean_rank": round(running.planner.mean_rank, 3),
                "rank": round(float(rank), 3),
            }
        return answer
