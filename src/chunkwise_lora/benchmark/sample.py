"""Speed, memory and quality of adapters on texts of a few hundred tokens, which come with the package.

This is enough to show what a method does, and far too little to judge its quality: `evaluation` does that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.benchmark.measure import Measurement, measure
from chunkwise_lora.benchmark.methods import Method, methods
from chunkwise_lora.benchmark.perplexity import perplexity
from chunkwise_lora.evaluation.data import Example, e2e, squad, wikitext
from chunkwise_lora.evaluation.metrics import Scores, bleu, exact_match_and_f1
from chunkwise_lora.evaluation.prompts import first_lines, prompt_inputs, set_padding
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig

SAMPLE = Path(__file__).parents[1] / "sample"
"""The texts, which were written for this project; no model was trained on them."""

SCORES = {"squad": "exact match", "e2e": "BLEU", "wiki": "perplexity"}
"""By adapter: the score of its part of the sample."""

NEW_TOKENS = 12
"""Tokens that a round of decoding adds."""

WINDOW = 128
"""Tokens of a window of text."""


@dataclass(frozen=True)
class SampleResult:
    """One method, averaged over the adapters, each on its part of the sample."""

    name: str
    decode_ms: float
    """Milliseconds per decode step of one sequence."""
    decode_ratio: float
    """That time divided by PEFT unmerged's."""
    adapter_bytes_per_pass: float
    """Bytes of adapter weights read per forward pass."""
    kv_bytes: float
    """Bytes of the KV cache in use after the first prompt of the sample."""
    scores: dict[str, float]
    """By name of the score: points from 0 to 100, or the perplexity."""


def run_sample(
    base: PreTrainedModel,
    tokenizer: Any,
    adapters: Mapping[str, str | Path],
    ladders: Mapping[str, RankLadder],
    policy: str,
    *,
    rounds: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[SampleResult]:
    """Compare the base model, PEFT merged and unmerged, and ChunkWise.

    ChunkWise runs `lossless`, and by the policies of the ladders.

    Args:
        base: The base model.
        tokenizer: Its tokenizer.
        adapters: Folders of adapters or ladders, for PEFT. The names are some of `SCORES`.
        ladders: The ladders of these adapters, with their policies.
        policy: What the results call these policies.
        rounds: Rounds of decoding.
        advance: Called with the number of finished pieces of work and their total number.

    Raises:
        ChunkWiseError: An adapter does not fit the base model.
    """
    set_padding(tokenizer)
    measured: dict[str, list[Measurement]] = {}
    scores: dict[str, dict[str, float]] = {}
    pieces = 5 * (rounds + 2)  # per adapter: methods, and for each of them rounds of decoding, a prefill and the score
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        advance(done, pieces * len(adapters))

    for name, folder in adapters.items():
        part, planned = _part_of(name, tokenizer), ladders[name].policy
        assert planned is not None
        configs = {"lossless": ChunkWiseConfig.preset("lossless"), policy: planned}
        compared = methods(base, {name: folder}, configs, ladders={name: ladders[name]})
        timed = measure(compared, part.prompt, new_tokens=NEW_TOKENS, rounds=rounds, prefill_rounds=1, advance=step)
        for one in timed:
            measured.setdefault(one.name, []).append(one)
        for method in compared:
            scores.setdefault(method.name, {})[SCORES[name]] = part.score(method)
            step()
    return [_mean(found, scores[name]) for name, found in measured.items()]


def _mean(found: Sequence[Measurement], scores: dict[str, float]) -> SampleResult:
    return SampleResult(
        name=found[0].name,
        decode_ms=statistics.mean(one.decode_ms for one in found),
        decode_ratio=statistics.mean(one.decode_ratio for one in found),
        adapter_bytes_per_pass=statistics.mean(one.adapter_bytes_per_pass for one in found),
        kv_bytes=statistics.mean(one.kv_bytes_in_use for one in found),
        scores=scores,
    )


@dataclass(frozen=True)
class _Part:
    """The part of the sample that belongs to one adapter."""

    prompt: Tensor
    """(1, tokens) token ids, after which decoding is timed."""
    score: Callable[[Method], float]


def _part_of(adapter: str, tokenizer: Any) -> _Part:
    if adapter == "wiki":
        ids = tokenizer(wikitext(str(SAMPLE / "wiki.txt")), return_tensors="pt").input_ids[0]
        windows = ids.unfold(0, WINDOW, WINDOW)
        return _Part(windows[:1], lambda method: perplexity(method, windows))
    read, metric, file = (squad, exact_match_and_f1, "squad.json") if adapter == "squad" else (e2e, bleu, "e2e.csv")
    examples = read(str(SAMPLE / file))
    prompt = prompt_inputs(examples[:1], tokenizer)["input_ids"]
    return _Part(prompt, lambda method: _first(metric(_answers(method, examples, tokenizer), examples)))


def _answers(method: Method, examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """Answer all prompts greedily in one batch, with at most twice as many tokens as the longest reference."""
    inputs: dict[str, Any] = prompt_inputs(examples, tokenizer)
    longest = max(len(tokenizer(reference).input_ids) for one in examples for reference in one.references)
    options: dict[str, Any] = {"max_new_tokens": 2 * longest, "do_sample": False}
    options["pad_token_id"] = tokenizer.pad_token_id
    if method.chunkwise is None:
        ids = method.model.generate(**inputs, **options)
    else:
        ids = method.chunkwise.generate(**inputs, **options, chunkwise_config=method.config)
    return first_lines(ids[:, inputs["input_ids"].shape[1] :], tokenizer)


def _first(scores: Scores) -> float:
    """The first score, in points."""
    return next(iter(scores.points().values())).value
