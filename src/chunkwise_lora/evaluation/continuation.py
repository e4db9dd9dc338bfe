"""Reads prompts with one method, and then answers: given ones, or those that the method generates greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunkwise_lora.evaluation.methods import Generator
from chunkwise_lora.evaluation.packing import common_beginning

NO_TOKEN = 0
"""Token id where the mask is 0."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of several sequences, padded, on the CPU."""

    ids: Tensor
    """(sequences, columns) token ids."""
    mask: Tensor
    """(sequences, columns) 1 for tokens, 0 for padding."""

    @classmethod
    def padded(cls, sequences: Sequence[Sequence[int]], side: str) -> Tokens:
        """Pad sequences on the `left` or the `right` side."""
        ids = [torch.tensor(one, dtype=torch.long) for one in sequences]
        mask = [torch.ones_like(one) for one in ids]
        return cls(
            pad_sequence(ids, batch_first=True, padding_value=NO_TOKEN, padding_side=side),
            pad_sequence(mask, batch_first=True, padding_side=side),
        )

    def __getitem__(self, key: object) -> Tokens:
        return Tokens(self.ids[key], self.mask[key])  # type: ignore[index]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that run together."""

    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    topics: Sequence[str]
    """The topic of each prompt. Prompts of one topic stand together, and what they begin with in common runs once."""

    def begin(self, method: Generator) -> Continuation:
        """Let a method read the prompts. Use the result in a `with` statement."""
        return Continuation(method, self)

    def rows(self, rows: Sequence[int]) -> PromptBatch:
        """Some of the prompts."""
        return PromptBatch([self.prompts[row] for row in rows], [self.topics[row] for row in rows])

    def common_beginnings(self) -> tuple[list[Sequence[int]], list[int]]:
        """What the prompts of each topic begin with in common, and for each prompt the number of its beginning.

        At least one token of each prompt is no part of its beginning.
        """
        beginnings: list[Sequence[int]] = []
        of_prompt: list[int] = []
        for _, group in groupby(zip(self.topics, self.prompts, strict=True), key=lambda pair: pair[0]):
            prompts = [prompt for _, prompt in group]
            of_prompt += [len(beginnings)] * len(prompts)
            beginnings.append(prompts[0][: common_beginning(prompts)])
        return beginnings, of_prompt


class Continuation:
    """A method that has read a batch of prompts, and reads on.

    Args:
        method: The method.
        batch: The prompts.
    """

    def __init__(self, method: Generator, batch: PromptBatch) -> None:
        self.method = method
        self._batch = batch
        self._stack = ExitStack()
        """Holds the method's call open."""

    def __enter__(self) -> Self:
        """Let the method read the prompts."""
        beginnings, of_prompt = self._batch.common_beginnings()
        prompts = self._batch.prompts
        if self.method.cache_changes or len(beginnings) == len(prompts) or not all(beginnings):
            parts = [Tokens.padded(prompts, "left")]
        else:
            rests = [prompt[len(beginnings[i]) :] for prompt, i in zip(prompts, of_prompt, strict=True)]
            parts = [Tokens.padded(beginnings, "left"), Tokens.padded(rests, "left")]
        self._columns = sum(part.ids.shape[1] for part in parts)
        """Columns of the prompts, padding included."""
        self._mask = parts[0].mask[:, :0]
        with ExitStack() as stack:
            self._opened = stack.enter_context(self.method.open(len(self._mask), self._columns))
            self.log_p = self._read(parts[0], last=True)[:, -1]
            """(prompts, vocabulary) log-probabilities of the token after each prompt."""
            if len(parts) > 1:
                self._select(torch.tensor(of_prompt))
                self.log_p = self._read(parts[1], last=True)[:, -1]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def rewind(self, rows: Tensor) -> None:
        """Forget everything after the prompts, and keep only some prompts: rows (n,).

        The method's cache must not change what it stores; see `Generator.cache_changes`.
        """
        if (read := self._mask.shape[1] - self._columns) > 0:
            self._opened.cache.crop(-read)
        self._mask = self._mask[:, : self._columns]
        self._select(rows)
        self.log_p = self.log_p[rows]

    def read(self, answers: Tokens) -> Tensor:
        """Read tokens after the prompts, padded on the right.

        Returns:
            (prompts, 1 + columns, vocabulary) log-probabilities of the next token, after the prompt and after each
            token.
        """
        passes = self.method.passes(answers.ids.shape[1], self._mask.sum(1).tolist())
        ends = accumulate(passes)
        parts = [answers[:, end - columns : end] for columns, end in zip(passes, ends, strict=True)]
        return torch.cat([self.log_p[:, None], *(self._read(part) for part in parts)], dim=1)

    def generate(self, new_tokens: int, ends: Callable[[int], bool]) -> tuple[list[list[int]], Tensor]:
        """Generate greedily.

        Args:
            new_tokens: Largest number of tokens.
            ends: Whether a token ends the answer.

        Returns:
            The tokens of each answer, with the one that ends it; and the log-probabilities (prompts, columns,
            vocabulary) that each of them was chosen from.
        """
        answers: list[list[int]] = [[] for _ in self.log_p]
        steps = [self.log_p]
        running = torch.ones(len(answers), 1, dtype=torch.long)
        while True:
            tokens = steps[-1].argmax(-1).cpu()
            for row, token in enumerate(tokens.tolist()):
                if running[row]:
                    answers[row].append(token)
                    running[row] = not ends(token)
            if len(steps) == new_tokens or not running.any():
                return answers, torch.stack(steps, dim=1)
            steps.append(self._read(Tokens(tokens[:, None], running.clone()))[:, -1])

    def mean_ranks(self) -> list[float]:
        """The mean rank of the tokens of each sequence so far."""
        if self._opened.trace is None:
            return [self.method.rank or 0.0] * len(self._mask)
        return [sequence.mean_rank for sequence in self._opened.trace().sequences]

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the KV cache in use, and what the same tokens take in full precision; (1, 1) if it is not known."""
        if self._opened.trace is None:
            return 1, 1
        trace = self._opened.trace()
        return trace.kv_bytes, trace.kv_bytes_full

    @torch.no_grad()
    def _read(self, tokens: Tokens, last: bool = False) -> Tensor:
        """Run tokens; returns log-probabilities (batch, columns, vocabulary), or only those after the last column."""
        self._mask = torch.cat([self._mask, tokens.mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.ids.shape[1] :]
        ids, mask, positions = (one.to(self.method.device) for one in (tokens.ids, self._mask, positions))
        options = {"attention_mask": mask, "position_ids": positions} | ({"logits_to_keep": 1} if last else {})
        return self.method.read(self._opened, ids, **options).float().log_softmax(-1)

    def _select(self, rows: Tensor) -> None:
        self._opened.cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
