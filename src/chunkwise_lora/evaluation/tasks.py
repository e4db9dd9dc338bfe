"""The tasks of `chunkwise eval`: from a data set to results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from chunkwise_lora import examples
from chunkwise_lora.calibration.text import block_length
from chunkwise_lora.errors import ChunkWiseError, ConfigError
from chunkwise_lora.evaluation import data as data_sets
from chunkwise_lora.evaluation.answers import evaluate_answers
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.methods import Method, full_rank_of
from chunkwise_lora.evaluation.metrics import bleu, exact_match_and_f1
from chunkwise_lora.evaluation.report import Evaluation
from chunkwise_lora.evaluation.text import evaluate_text, windows_of
from chunkwise_lora.ladder import RankLadder

TASKS = ("wikitext", "squad", "e2e")
ANSWERS = {
    "squad": (data_sets.squad, exact_match_and_f1, "exact match"),
    "e2e": (data_sets.e2e, bleu, "BLEU"),
}
"""For tasks with answers: the reader of the data, the metric, and its first score."""
MAX_WINDOW = 2048
"""Longest window of text, in tokens, for models with more positions."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of the data is evaluated, and how."""

    limit: int | None = None
    """Largest number of windows of text, or of examples; None takes all."""
    stride: int | None = None
    """Tokens from the start of one window of text to the start of the next; by default windows do not overlap."""
    new_tokens: int = NEW_TOKENS
    """Largest number of tokens of an answer."""
    batch: int = 16
    """Windows or prompts that run together."""


def adapter_of(task: str, adapter: str) -> str | Path:
    """The folder or hub name of an adapter.

    Args:
        task: One of `TASKS`.
        adapter: A folder, a name on the hub or an example; if empty, the example for the task.

    Raises:
        ChunkWiseError: The task is unknown, or the example is not installed.
    """
    if task not in TASKS:
        raise ChunkWiseError(f"--task {task}: choose one of {', '.join(TASKS)}")
    return examples.find(adapter or {"wikitext": "wiki"}.get(task, task))


def calibrated_ladder(folder: str | Path) -> RankLadder:
    """Read a ladder that must have a policy.

    Raises:
        LadderError: The folder is damaged or holds no ladder.
        ConfigError: The ladder has no policy.
    """
    ladder = RankLadder.from_pretrained(folder)
    if ladder.policy is None:
        raise ConfigError(f"{folder}: the ladder has no policy; run `chunkwise calibrate` for it")
    return ladder


def calibration_tokens(
    task: str, data: str, tokenizer: Any, block: int, answer: Callable[[Sequence[Example]], list[Example]]
) -> tuple[list[int], list[bool] | None, int]:
    """Read a task's data as text to calibrate on.

    Args:
        task: One of `TASKS`.
        data: A file, or a data set on the hub.
        tokenizer: The base model's tokenizer.
        block: Largest number of tokens per block.
        answer: Generates the answers of examples that have none; see `AnswerGenerator`.

    Returns:
        Token ids of the text; for each token whether the prediction after it is scored, or None if all are (only the
        predictions of answers are scored, not those of prompts); and the number of tokens per block.

    Raises:
        ChunkWiseError: The data cannot be read, or holds no examples.
    """
    if task == "wikitext":
        return tokenizer(data_sets.wikitext(data)).input_ids, None, block
    examples = _examples(task, data)
    answered = [one for one in examples if one.references]
    if len(answered) < len(examples):
        answered += answer([one for one in examples if not one.references])
    if not answered:
        raise ChunkWiseError(
            f"{data}: holds no answers, and the adapter generates none that ends within {NEW_TOKENS} tokens; give an "
            f"adapter for {task}, or data with answers"
        )
    return data_sets.packed(answered, tokenizer, block)


def run_task(
    task: str,
    data: str,
    methods: Sequence[Method],
    tokenizer: Any,
    settings: EvaluationSettings | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare methods on one task.

    Args:
        task: One of `TASKS`.
        data: A file, or a data set on the hub.
        methods: The methods, from `Comparison.methods`; one of them must be the full rank.
        tokenizer: The base model's tokenizer.
        settings: How much is evaluated, and how.
        advance: Called with the number of finished pieces of work and their total number.

    Raises:
        ChunkWiseError: The data cannot be read, holds too little, or has prompts without answers.
    """
    job = _Job(data, methods, tokenizer, settings or EvaluationSettings(), advance)
    return job.text() if task == "wikitext" else job.answers(task)


@dataclass
class _Job:
    """The evaluation of methods on one data set."""

    data: str
    methods: Sequence[Method]
    tokenizer: Any
    settings: EvaluationSettings
    advance: Callable[[int, int], None]
    done: int = field(default=0, init=False)

    def answers(self, task: str) -> Evaluation:
        """Compare the answers that the methods generate."""
        _, metric, first_score = ANSWERS[task]
        examples = _examples(task, self.data)[: self.settings.limit]
        if unknown := [one.prompt for one in examples if not one.references]:
            prompt = textwrap.shorten(unknown[0], 80, placeholder="...")
            raise ChunkWiseError(
                f"{self.data}: {len(unknown)} of {len(examples)} prompts have no answer to score against, such as "
                f"{prompt!r}; add answers or remove these prompts"
            )
        able = [method for method in self.methods if method.options is not None]
        batch, new_tokens = self.settings.batch, self.settings.new_tokens
        total = len(able) * -(-len(examples) // batch)
        results = evaluate_answers(
            able,
            examples,
            self.tokenizer,
            metric,
            new_tokens=new_tokens,
            batch=batch,
            advance=lambda: self._advance(total),
        )
        how = (
            f"{len(examples)} examples in {self._dtype}, {batch} in a batch, with greedy answers of at most "
            f"{new_tokens} tokens. The intervals are 95% bootstrap intervals over examples; differences to full rank "
            "are paired."
        )
        return Evaluation(f"{task}: {first_score}", how, first_score, results)

    def text(self) -> Evaluation:
        """Compare the perplexity of text under the methods."""
        length = block_length(self._model, MAX_WINDOW)
        stride = self.settings.stride or length
        if stride > length:
            raise ChunkWiseError(
                f"--stride {stride} would skip text, because windows have {length} tokens; give at most {length}"
            )
        windows = windows_of(self.tokenizer(data_sets.wikitext(self.data)).input_ids, length, stride)
        windows = windows[: self.settings.limit]
        if windows.shape[1] < 2:
            raise ChunkWiseError(f"{self.data}: has fewer than 2 tokens; give a longer text")
        total = len(self.methods) * -(-len(windows) // self.settings.batch)
        results, sample = evaluate_text(
            self.methods,
            windows,
            stride,
            lambda ids: len(self.tokenizer.decode(ids).split()),
            batch=self.settings.batch,
            advance=lambda: self._advance(total),
        )
        how = (
            f"{len(windows)} windows of {windows.shape[1]} tokens in {self._dtype}, one every {stride} tokens, each "
            "with an empty context at its start. ChunkWise runs token by token with its KV policy in force. The "
            "intervals are 95% bootstrap intervals over segments of 64 tokens; increases over full rank are paired."
        )
        shown = None
        if sample is not None:
            pieces = [self.tokenizer.decode([token]) for token in sample.tokens]
            shown = (pieces, sample.ranks, max(one.mean_rank for one in results))
        return Evaluation("wikitext: perplexity", how, "perplexity per token", results, shown)

    @property
    def _model(self) -> PreTrainedModel:
        return cast("PreTrainedModel", full_rank_of(self.methods).model)

    @property
    def _dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def _advance(self, total: int) -> None:
        self.done += 1
        self.advance(self.done, total)


def _examples(task: str, data: str) -> list[Example]:
    read, *_ = ANSWERS[task]
    examples = read(data)
    if not examples:
        raise ChunkWiseError(f"{data}: holds no examples; give data with at least one prompt")
    return examples
