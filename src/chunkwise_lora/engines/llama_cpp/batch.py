"""Completes several prompts at once, each with its own adapter and plan."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_cpp import llama_cpp

from chunkwise_lora.engines.llama_cpp.session import Request, Session
from chunkwise_lora.errors import EngineError


@dataclass
class Row:
    """One prompt of a batch, and what was generated for it."""

    sequence: int
    prompt: list[int]
    request: Request
    sampler: Any
    """The `LlamaSampler` of this prompt."""
    new: list[int] = field(default_factory=list)
    text: bytes = b""
    finish_reason: str | None = None
    _read: int = 0
    """Tokens of the prompt that were run."""

    def take(self, room: int) -> list[int]:
        """Return the next tokens to run, at most `room`."""
        if self.new:
            return self.new[-1:][:room]
        tokens = self.prompt[self._read : self._read + room]
        self._read += len(tokens)
        return tokens

    @property
    def position(self) -> int:
        """Position of the next token to run."""
        return self._read + max(len(self.new) - 1, 0)

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt was run."""
        return self._read == len(self.prompt)


def complete(llm: Any, session: Session, rows: Sequence[Row], max_tokens: int, stops: Sequence[bytes]) -> None:
    """Generate for all rows until each of them ends. Their prompts are run in passes with other rows' tokens."""
    session.begin_batch([(row.sequence, row.request, row.prompt) for row in rows])
    while running := [row for row in rows if row.finish_reason is None]:
        last_rows = _fill(llm, running)
        llm._ctx.decode(llm._batch)
        for row, last in last_rows:
            if row.is_read:
                _append(llm, row, row.sampler.sample(llm._ctx, last), max_tokens, stops)


def _fill(llm: Any, rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Fill llama.cpp's batch; returns the rows in it, and where the last token of each is."""
    room, parts, taken = llm.n_batch, [], []
    for row in rows:
        position = row.position
        tokens = row.take(room)
        if tokens:
            parts.append((row.sequence, position, tokens))
            taken.append(row)
            room -= len(tokens)
    return list(zip(taken, fill(llm, parts), strict=True))


def fill(llm: Any, parts: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
    """Fill llama.cpp's batch with runs of tokens: the sequence, the position of the first token, and the tokens.

    Logits are computed for the last token of each run. Returns where these are in the batch.
    """
    batch, place, lasts = llm._batch.batch, 0, []
    for sequence, position, tokens in parts:
        for offset, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, position + offset
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = offset == len(tokens) - 1
            place += 1
        lasts.append(place - 1)
    batch.n_tokens = place
    return lasts


def _append(llm: Any, row: Row, token: int, max_tokens: int, stops: Sequence[bytes]) -> None:
    """Append a sampled token to a row, and end the row if it ends the text."""
    if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
        row.finish_reason = "stop"
        return
    row.new.append(token)
    row.text = llm.detokenize(row.new, prev_tokens=row.prompt)
    found = [row.text.index(stop) for stop in stops if stop in row.text]
    if found:
        row.text, row.finish_reason = row.text[: min(found)], "stop"
    elif len(row.new) == max_tokens:
        row.finish_reason = "length"


def answer(llm: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows as a completion in OpenAI's form, with a choice for each prompt."""
    prompt_tokens, new_tokens = sum(len(row.prompt) for row in rows), sum(len(row.new) for row in rows)
    return {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": llm.model_path,
        "choices": [
            {
                "text": row.text.decode(errors="ignore"),
                "index": index,
                "logprobs": None,
                "finish_reason": row.finish_reason,
            }
            for index, row in enumerate(rows)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }


def check_room(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Check that a batch fits into the context.

    Raises:
        EngineError: There are more prompts than sequences, a prompt is empty, `max_tokens` is below 1, or the tokens
            exceed the context.
    """
    if max_tokens < 1:
        raise EngineError(f"max_tokens={max_tokens}: give at least 1")
    if len(prompts) > llm.max_sequences:
        raise EngineError(f"{len(prompts)} prompts, but max_sequences is {llm.max_sequences}; load the model with more")
    if not all(prompts):
        raise EngineError("a prompt is empty; give at least one token")
    needed = sum(map(len, prompts)) + max_tokens * len(prompts)
    if needed > llm.n_ctx():
        raise EngineError(
            f"the batch needs {needed} tokens of context, but n_ctx is {llm.n_ctx()}; give a larger n_ctx"
        )
