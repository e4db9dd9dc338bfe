"""The tasks of `chunkwise eval`: from a data set to results."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chunkwise_lora import examples
from chunkwise_lora.calibration.text import block_length
from chunkwise_lora.errors import ChunkWiseError, ConfigError
from chunkwise_lora.evaluation import data as data_sets
from chunkwise_lora.evaluation.answers import evaluate_answers
from chunkwise_lora.evaluation.baselines import CALIBRATED, Comparison, MethodSelection
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.methods import Generator
from chunkwise_lora.evaluation.metrics import Metric, bleu, exact_match_and_f1
from chunkwise_lora.evaluation.packing import fitting, packed
from chunkwise_lora.evaluation.results import Evaluation, Score
from chunkwise_lora.evaluation.settings import EvaluationSettings
from chunkwise_lora.evaluation.text import PERPLEXITY, evaluate_text, windows_of
from chunkwise_lora.ladder import RankLadder, is_ladder

logger = logging.getLogger(__name__)

TASKS = ("wikitext", "squad", "e2e")
ANSWERS: dict[str, tuple[Callable[[str], list[Example]], Metric, Sequence[Score]]] = {
    "squad": (
        data_sets.squad,
        exact_match_and_f1,
        [Score("exact match", "points", higher_is_better=True), Score("F1", "points", higher_is_better=True)],
    ),
    "e2e": (data_sets.e2e, bleu, [Score("BLEU", "points", higher_is_better=True)]),
}
"""For tasks with answers: the reader of the data, the metric, and its scores."""
MAX_WINDOW = 1024
"""Longest window of text, in tokens, for models with more positions."""
MEMORY = 2 << 30
"""Bytes that the log-probabilities of the windows that run together may take."""
SAMPLE = 8
"""Prompts whose mean rank is taken for that of the whole data, to choose the ranks of baselines."""


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


def own_policy(adapter: str | Path) -> dict[str, RankLadder]:
    """The ladder in the adapter's folder, by the name `calibrated`, if it has a policy."""
    if not is_ladder(adapter):
        return {}
    ladder = RankLadder.from_pretrained(adapter)
    return {CALIBRATED: ladder} if ladder.policy is not None else {}


@dataclass(frozen=True)
class CalibrationReader:
    """Reads a task's data as text to calibrate on."""

    task: str
    """One of `TASKS`."""
    tokenizer: Any
    """The base model's tokenizer."""
    answer: Callable[[Sequence[Example]], list[Example]]
    """Generates the answers of examples that have none; see `AnswerGenerator`."""
    say: Callable[[str], object] = logger.warning
    """Is told which examples are left out because they do not fit into a block."""

    def __call__(
        self, data: str, block: int, *, exact: bool = False, tokens: int | None = None
    ) -> tuple[list[int], list[bool] | None, int]:
        """Read a file, or a data set on the hub.

        Args:
            data: The file or the name of the data set.
            block: Largest number of tokens per block.
            exact: Blocks have `block` tokens. By default they have fewer if most examples are shorter.
            tokens: About how many tokens of examples are needed; None takes all.

        Returns:
            Token ids of the text; for each token whether the prediction after it is scored, or None if all are (only
            the predictions of answers are scored, not those of prompts); and the number of tokens per block.

        Raises:
            ChunkWiseError: The data cannot be read, or holds no examples.
        """
        if self.task == "wikitext":
            return self.tokenizer(data_sets.wikitext(data)).input_ids, None, block
        found = _examples(self.task, data)
        examples = fitting(found, self.tokenizer, block, tokens, lambda note: self.say(f"{data}: {note}"))
        answered = [one for one in examples if one.references]
        if len(answered) < len(examples):
            answered += self.answer([one for one in examples if not one.references])
        if not answered:
            raise ChunkWiseError(
                f"{data}: holds no answers, and the adapter generates none that ends within {NEW_TOKENS} tokens; give "
                f"an adapter for {self.task}, or data with answers"
            )
        return packed(answered, self.tokenizer, block, exact=exact)


def run_task(
    task: str,
    data: str,
    comparison: Comparison,
    selection: MethodSelection,
    tokenizer: Any,
    settings: EvaluationSettings | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare methods on one task.

    Args:
        task: One of `TASKS`.
        data: A file, or a data set on the hub.
        comparison: Makes the methods.
        selection: Which methods to compare.
        tokenizer: The base model's tokenizer.
        settings: How much is evaluated, and how.
        advance: Called with the number of finished pieces of work and their total number, in this process.

    Raises:
        ChunkWiseError: The data cannot be read, holds too little, or has prompts without answers; or a method cannot be
            made.
    """
    job = _Job(data, comparison, selection, tokenizer, settings or EvaluationSettings(), advance)
    return job.text() if task == "wikitext" else job.answers(task)


@dataclass
class _Job:
    """The evaluation of methods on one data set."""

    data: str
    comparison: Comparison
    selection: MethodSelection
    tokenizer: Any
    settings: EvaluationSettings
    advance: Callable[[int, int], None]
    done: int = field(default=0, init=False)

    def answers(self, task: str) -> Evaluation:
        """Compare the answers that the methods generate."""
        _, metric, scores = ANSWERS[task]
        examples = _examples(task, self.data)[: self.settings.limit]
        if unknown := [one.prompt for one in examples if not one.references]:
            prompt = textwrap.shorten(unknown[0], 80, placeholder="...")
            raise ChunkWiseError(
                f"{self.data}: {len(unknown)} of {len(examples)} prompts have no answer to score against, such as "
                f"{prompt!r}; add answers or remove these prompts"
            )
        batch, new_tokens = self.settings.batch, self.settings.new_tokens
        ids = self.tokenizer([one.prompt for one in examples[:: max(1, len(examples) // SAMPLE)]]).input_ids
        shortest = min(map(len, ids))
        methods = self.comparison.methods(self.selection, torch.tensor([one[:shortest] for one in ids]))
        able = [method for method in methods if isinstance(method, Generator)]
        total = len(able) * len(self.settings.processes.share_of(range(0, len(examples), batch)))
        results = evaluate_answers(
            able,
            examples,
            self.tokenizer,
            metric,
            self.settings,
            expectations=self.comparison.expectations(),
            advance=lambda: self._advance(total),
        )
        how = (
            f"{_counted(len(examples), 'example')} in {self._dtype}, with greedy answers of at most "
            f"{_counted(new_tokens, 'token')}. KL is measured on the answers of full rank. Intervals are 95% bootstrap "
            "intervals over examples; differences to full rank are paired."
        )
        return Evaluation(task, how, scores, self.comparison.full_rank, results)

    def text(self) -> Evaluation:
        """Compare the perplexity of text under the methods."""
        length = block_length(self.comparison.base, MAX_WINDOW)
        stride = self.settings.stride or length
        if stride > length:
            raise ChunkWiseError(
                f"--stride {stride} would skip text, because windows have {length} tokens; give at most {length}"
            )
        windows = windows_of(self.tokenizer(data_sets.wikitext(self.data)).input_ids, length, stride)
        windows = windows[: self.settings.limit]
        if windows.shape[1] < 2:
            raise ChunkWiseError(f"{self.data}: has fewer than 2 tokens; give a longer text")
        methods = self.comparison.methods(self.selection, windows[:1])
        batch = min(self.settings.batch, self._most_windows(windows.shape[1]))
        total = len(methods) * len(self.settings.processes.share_of(range(0, len(windows), batch)))
        results, sample = evaluate_text(
            methods,
            windows,
            stride,
            batch=batch,
            expectations=self.comparison.expectations(),
            processes=self.settings.processes,
            advance=lambda: self._advance(total),
        )
        apart = f", one every {_counted(stride, 'token')}" if stride < length else ""
        how = (
            f"{_counted(len(windows), 'window')} of {_counted(windows.shape[1], 'token')} in {self._dtype}{apart}, "
            "each with an empty context at its start. ChunkWise runs as in generation, with its KV policy in force. "
            "Intervals are 95% bootstrap intervals over segments of 64 tokens; increases over full rank are paired."
        )
        shown = None
        if sample is not None:
            shown = ([self.tokenizer.decode([token]) for token in sample.tokens], sample.ranks)
        score = Score(PERPLEXITY, "%", higher_is_better=False)
        return Evaluation("wikitext", how, [score], self.comparison.full_rank, results, shown)

    def _most_windows(self, tokens: int) -> int:
        """The largest number of windows whose log-probabilities fit into `MEMORY`."""
        vocabulary = self.comparison.base.get_output_embeddings().weight.shape[0]
        return max(1, MEMORY // (4 * tokens * vocabulary))

    @property
    def _dtype(self) -> str:
        return str(self.comparison.base.dtype).removeprefix("torch.")

    def _advance(self, total: int) -> None:
        self.done += 1
        self.advance(self.done, total)


def _counted(number: int, what: str) -> str:
    """A number of things, with the plural."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _examples(task: str, data: str) -> list[Example]:
    read, *_ = ANSWERS[task]
    examples = read(data)
    if not examples:
        raise ChunkWiseError(f"{data}: holds no examples; give data with at least one prompt")
    return examples
