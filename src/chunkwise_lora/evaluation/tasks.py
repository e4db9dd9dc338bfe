"""The tasks of `chunkwise eval`, from a data set to results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from chunkwise_lora import embedded
from chunkwise_lora.errors import ChunkWiseError, ConfigError
from chunkwise_lora.evaluation import data as data_sets
from chunkwise_lora.evaluation.answers import bleu, evaluate_answers, exact_match_and_f1
from chunkwise_lora.evaluation.baselines import Contender, Field
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.report import Evaluation
from chunkwise_lora.evaluation.text import evaluate_text, windows_of
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig

TASKS = ("wikitext", "squad", "e2e")
ANSWERS = {
    "squad": (data_sets.squad, exact_match_and_f1, "exact match"),
    "e2e": (data_sets.e2e, bleu, "BLEU"),
}
WINDOW = 2048
"""Longest window of text, where the model's positions are more."""


def adapter_of(task: str, adapter: str) -> str | Path:
    """Where an adapter lies that may be an embedded one, or, if empty, the embedded one of the task.

    Raises:
        ChunkWiseError: The task is unknown, or no adapter for it is embedded.
    """
    if task not in TASKS:
        raise ChunkWiseError(f"--task {task}: choose one of {', '.join(TASKS)}")
    name = adapter or {"wikitext": "wiki"}.get(task, task)
    if not adapter and name not in embedded.ADAPTERS:
        raise ChunkWiseError(f"--task {task}: no adapter for it is embedded; give --adapter")
    return embedded.find(name)


def calibration_tokens(
    task: str, data: str, tokenizer: Any, block: int, answer: Callable[[Sequence[Example]], list[Example]]
) -> tuple[list[int], list[bool] | None, int]:
    """Token ids of a task's data to calibrate on, after which of them an answer's token follows (None: all count), and
    the length, at most `block`, of the sequences they make.

    `answer` is for the examples whose answers are not known; see `own_answers`.

    Raises:
        ChunkWiseError: The data cannot be read, or holds nothing.
    """
    if task == "wikitext":
        return tokenizer(data_sets.wikitext(data)).input_ids, None, block
    examples = _examples(task, data)
    known = [one for one in examples if one.references]
    if len(known) < len(examples):
        known += answer([one for one in examples if not one.references])
    if not known:
        raise ChunkWiseError(
            f"{data}: no answer is known, and the adapter ends none within {NEW_TOKENS} tokens; is it one for {task}?"
        )
    return data_sets.packed(known, tokenizer, block)


def run_task(
    task: str,
    data: str,
    base: PreTrainedModel,
    tokenizer: Any,
    adapter: str,
    *,
    calibrated: str | Path | None = None,
    presets: Sequence[str],
    rivals: Sequence[str],
    peft: Mapping[str, str],
    configs: Mapping[str, ChunkWiseConfig] | None = None,
    limit: int | None = None,
    stride: int | None = None,
    new_tokens: int = NEW_TOKENS,
    batch: int = 16,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate an adapter on one of `TASKS`; `advance` is told the pieces of work done and all of them."""
    both = _calibrated(calibrated) if calibrated else None
    contenders = Field(base, adapter, both).contenders(presets, rivals, peft, configs)
    if task == "wikitext":
        return _text(data, base, tokenizer, contenders, limit, stride, batch, advance)
    _, metric, name = ANSWERS[task]
    examples = _examples(task, data)[:limit]
    if unknown := [one.prompt for one in examples if not one.references]:
        such = textwrap.shorten(unknown[0], 80, placeholder="...")
        raise ChunkWiseError(
            f"{data}: no answer is known to {len(unknown)} of {len(examples)} prompts, such as {such!r}"
        )
    able = [one for one in contenders if one.options is not None]
    counter = _Counter(len(able) * -(-len(examples) // batch), advance)
    results = evaluate_answers(
        able, examples, tokenizer, metric, new_tokens=new_tokens, batch=batch, advance=counter.advance
    )
    how = (
        f"{len(examples)} examples, answered greedily with at most {new_tokens} tokens, {batch} in a batch, "
        f"{str(base.dtype).removeprefix('torch.')}; 95% bootstrap intervals over examples, those over full "
        "rank paired."
    )
    return Evaluation(f"{task}: {name}", how, name, results)


def _calibrated(folder: str | Path) -> tuple[RankLadder, ChunkWiseConfig]:
    ladder = RankLadder.from_pretrained(folder)
    if ladder.policy is None:
        raise ConfigError(f"{folder}: the ladder has no policy; run `chunkwise calibrate` for it")
    return ladder, ladder.policy


def _examples(task: str, data: str) -> list[Example]:
    read, *_ = ANSWERS[task]
    examples = read(data)
    if not examples:
        raise ChunkWiseError(f"{data}: holds no examples")
    return examples


def _text(
    data: str,
    base: PreTrainedModel,
    tokenizer: Any,
    contenders: Sequence[Contender],
    limit: int | None,
    stride: int | None,
    batch: int,
    advance: Callable[[int, int], None],
) -> Evaluation:
    length = min(WINDOW, getattr(base.config.get_text_config(), "max_position_embeddings", WINDOW))
    stride = stride or length
    if stride > length:
        raise ChunkWiseError(f"--stride {stride} would skip text: windows have {length} tokens")
    tokens = tokenizer(data_sets.wikitext(data)).input_ids
    windows = windows_of(tokens, length, stride)[:limit]
    if windows.shape[1] < 2:
        raise ChunkWiseError(f"{data}: has too little text to score")
    counter = _Counter(len(contenders) * -(-len(windows) // batch), advance)
    results, sample = evaluate_text(
        contenders,
        windows,
        stride,
        lambda ids: len(tokenizer.decode(ids).split()),
        batch=batch,
        advance=counter.advance,
    )
    how = (
        f"{len(windows)} windows of {windows.shape[1]} tokens, one every {stride}, each from an empty context, "
        f"{str(base.dtype).removeprefix('torch.')}; ChunkWise runs token by token with its KV policy in force; 95% "
        "bootstrap intervals over segments of 64 tokens, the increase over full rank paired."
    )
    shown = None
    if sample is not None:
        pieces = [tokenizer.decode([token]) for token in sample.tokens]
        shown = (pieces, sample.ranks, max(one.mean_rank for one in results))
    return Evaluation("wikitext: perplexity", how, "perplexity per token", results, shown)


class _Counter:
    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self.done, self.total, self.tell = 0, total, tell

    def advance(self) -> None:
        self.done += 1
        self.tell(self.done, self.total)
