"""ChunkWise beside the base model, PEFT merged and PEFT unmerged, in one process and interleaved rounds."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from chunkwise_lora.config import ChunkWiseConfig
from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.ladder import RankLadder

UNMERGED = "PEFT unmerged"


@dataclass
class Contestant:
    """A way to run one adapter. `chunkwise` is set where it is ours."""

    name: str
    model: PreTrainedModel
    adapter_bytes: int = 0
    """Bytes of adapter factors that a pass reads, for contestants other than ours."""
    chunkwise: ChunkWiseModel | None = None
    config: ChunkWiseConfig | None = None


@dataclass(frozen=True)
class Comparison:
    """What one contestant took; times are medians over rounds."""

    name: str
    prefill_ms: float
    """From the call of generate to the first new token."""
    decode_ms: float
    """Per new token after the first."""
    decode_ratio: float
    """Median over rounds of the decode time over PEFT unmerged's in the same round."""
    prefill_ratio: float
    """The same of the prefill time."""
    adapter_bytes_per_token: float
    """Adapter bytes read per forward pass of the generation, averaged over passes."""
    kv_bytes: int
    """KV-cache storage at the end of the generation, counted from the tensors."""
    perplexity: float | None
    """On the held text, as generation would run it."""
    rounds: int


@dataclass
class _Clock:
    """A streamer of transformers that notes when tokens come."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def contestants(
    base: PreTrainedModel, adapter: str | Path, presets: Mapping[str, ChunkWiseConfig], ladder: RankLadder | None = None
) -> list[Contestant]:
    """Base, PEFT merged, PEFT unmerged and ours per preset, each with weights of its own, all in the base's dtype."""
    from peft import PeftModel

    unmerged = PeftModel.from_pretrained(copy.deepcopy(base), adapter, autocast_adapter_dtype=False).eval()
    unmerged.to(base.dtype)
    adapter_bytes = sum(p.nbytes for name, p in unmerged.named_parameters() if "lora_" in name)
    merged = copy.deepcopy(unmerged).merge_and_unload()
    chunkwise = ChunkWiseModel(copy.deepcopy(base), ladder or RankLadder.load(adapter))
    return [
        Contestant("base, no adapter", base),
        Contestant("PEFT merged", merged),
        Contestant(UNMERGED, unmerged, adapter_bytes),
        *(
            Contestant(f"ChunkWise {name}", chunkwise.model, chunkwise=chunkwise, config=config)
            for name, config in presets.items()
        ),
    ]


def compare(
    entrants: Sequence[Contestant],
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    held: Tensor | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Generate `new_tokens` greedily from `prompt` (batch, tokens), `rounds` times after a warm-up, in turns.

    One entrant must be PEFT unmerged. `held` (1, tokens) is scored besides. `advance` is called after every piece of
    work, rounds + 2 times per entrant.
    """
    times: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in entrants}
    sizes: dict[str, tuple[float, int]] = {}
    for turn in range(rounds + 1):
        # The order rotates, so that no one always runs after the same neighbour.
        for entrant in (*entrants[turn % len(entrants) :], *entrants[: turn % len(entrants)]):
            run = _generate(entrant, prompt, new_tokens)
            sizes[entrant.name] = run[2:]
            if turn:
                times[entrant.name].append(run[:2])
            advance()
    results = []
    for entrant in entrants:
        prefills, decodes = zip(*times[entrant.name], strict=True)
        perplexity = None if held is None else score(entrant, held)
        advance()
        results.append(
            Comparison(
                name=entrant.name,
                prefill_ms=statistics.median(prefills),
                decode_ms=statistics.median(decodes),
                prefill_ratio=_paired(times, entrant.name, 0),
                decode_ratio=_paired(times, entrant.name, 1),
                adapter_bytes_per_token=sizes[entrant.name][0],
                kv_bytes=sizes[entrant.name][1],
                perplexity=perplexity,
                rounds=rounds,
            )
        )
    return results


def _paired(times: Mapping[str, Sequence[tuple[float, float]]], name: str, which: int) -> float:
    return statistics.median(own[which] / other[which] for own, other in zip(times[name], times[UNMERGED], strict=True))


def _generate(entrant: Contestant, prompt: Tensor, new_tokens: int) -> tuple[float, float, float, int]:
    """Prefill ms, decode ms per token, adapter bytes per pass, KV bytes."""
    clock = _Clock()
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "streamer": clock,
    }
    start = time.perf_counter()
    if entrant.chunkwise is not None:
        entrant.chunkwise.generate(prompt, chunkwise_config=entrant.config, **options)
        trace = entrant.chunkwise.trace
        assert trace is not None
        adapter_bytes, kv_bytes = trace.adapter_bytes_read / trace.passes, trace.kv_bytes
    else:
        cache = DynamicCache(config=entrant.model.config.get_text_config())
        with torch.no_grad():
            entrant.model.generate(input_ids=prompt, past_key_values=cache, **options)
        adapter_bytes = float(entrant.adapter_bytes)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    _, first, *rest = clock.times  # transformers hands the prompt to the streamer first
    decode = (rest[-1] - first) / len(rest) if rest else 0.0
    return (first - start) * 1e3, decode * 1e3, adapter_bytes, kv_bytes


@torch.no_grad()
def score(entrant: Contestant, tokens: Tensor) -> float:
    """Perplexity per token of `tokens` (1, n) after the first.

    Ours runs token by token with plan, cross-fades and KV policy in force, as generation would; for the others one
    pass gives the same.
    """
    if entrant.chunkwise is None:
        logits = entrant.model(input_ids=tokens).logits[0, :-1]
    else:
        steps = []
        with entrant.chunkwise.stream(chunkwise_config=entrant.config) as session:
            for column in range(tokens.shape[1] - 1):
                ids = tokens[:, column : column + 1]
                steps.append(entrant.model(input_ids=ids, past_key_values=session.cache, use_cache=True).logits[0, -1])
        logits = torch.stack(steps)
    loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:])
    return float(loss.exp())
