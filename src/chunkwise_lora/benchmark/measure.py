"""Latency and memory of ChunkWise, the base model, PEFT merged and PEFT unmerged: one process, interleaved rounds."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from chunkwise_lora.benchmark.memory import PeakMemory
from chunkwise_lora.engines.transformers.layers import FastPaths
from chunkwise_lora.engines.transformers.model import PREFILL_TOKENS, ChunkWiseModel
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig

BASE, MERGED, UNMERGED = "base, no adapter", "PEFT merged", "PEFT unmerged"
STATIC, QUANTIZED = "PEFT unmerged, static cache", "PEFT unmerged, quantized cache"
WARM_UP = 3
"""Tokens decoded before the clock runs."""


@dataclass
class Contestant:
    """A way to run adapters. `chunkwise` is set where it is ours."""

    name: str
    model: Any
    adapter_bytes: int = 0
    """Bytes of adapter factors that a decode step of one sequence reads, for contestants other than ours."""
    chunkwise: ChunkWiseModel | None = None
    config: ChunkWiseConfig | None = None
    adapters: tuple[str, ...] = ()
    """Names of the adapters that the sequences of a batch take in turns; empty for one that all share."""


@dataclass(frozen=True)
class Measurement:
    """What one contestant took for one batch of prompts. Times are medians over rounds."""

    name: str
    context: int
    """Prompt tokens of each sequence."""
    batch: int
    prefill_ms: float | None
    """For the whole batch of prompts; None where a prefill was not run."""
    decode_ms: float
    """Per decode step, which gives every sequence a token."""
    decode_ratio: float
    """Median over rounds of the decode time over PEFT unmerged's in the same round."""
    decode_spread: tuple[float, float]
    """Quartiles of that ratio."""
    decode_over_base: float | None
    """Median ratio to the base model, where it takes part."""
    prefill_ratio: float | None
    prefill_over_base: float | None
    adapter_bytes_per_pass: float
    """Adapter bytes read per forward pass, averaged over passes."""
    kv_bytes: int
    """KV-cache storage after the first few decode steps, counted from the tensors."""
    peak_bytes: int | None
    """Highest memory of the process (or GPU) in prefill and first decode steps, above what it held before."""
    scheduler_ms: float
    """Planning per decode step."""
    rounds: int
    prefill_rounds: int


def contestants(
    base: PreTrainedModel,
    adapters: Mapping[str, str | Path],
    presets: Mapping[str, ChunkWiseConfig],
    *,
    ladders: Mapping[str, RankLadder] | None = None,
    caches: bool = False,
    fast: FastPaths | None = None,
) -> list[Contestant]:
    """Base, PEFT merged, PEFT unmerged and ours per preset, in the base's dtype.

    They share the base's weights, but for the merged one. With several `adapters` the sequences of a batch take them in
    turns, and none can be merged. `caches` adds PEFT over transformers' static and quantised caches, where they run.
    """
    (first, folder), *others = adapters.items()
    unmerged = PeftModel.from_pretrained(_shared(base), folder, adapter_name=first, autocast_adapter_dtype=False).eval()
    for name, folder in others:
        unmerged.load_adapter(folder, name, autocast_adapter_dtype=False)
    unmerged.to(base.dtype)
    factors = [(name, p.nbytes) for name, p in unmerged.named_parameters() if "lora_" in name]
    adapter_bytes = sum(nbytes for name, nbytes in factors if f".{first}." in name)
    names = tuple(adapters) if others else ()
    entrants = [Contestant(BASE, base)]
    if not others:
        entrants.append(Contestant(MERGED, copy.deepcopy(unmerged).merge_and_unload()))
    rivals = [UNMERGED, *((STATIC, QUANTIZED) if caches else ())]
    entrants += [Contestant(name, unmerged, adapter_bytes, adapters=names) for name in rivals if _runs(name, base)]
    sources = ladders or {name: RankLadder.load(path) for name, path in adapters.items()}
    for name, config in presets.items():
        chunkwise = ChunkWiseModel(_shared(base), sources, config, fast)
        entrants.append(
            Contestant(f"ChunkWise {name}", chunkwise.model, chunkwise=chunkwise, config=config, adapters=names)
        )
    return entrants


def _shared(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same weights."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def _runs(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers' cache of that contestant can be made here."""
    try:
        _cache(name, model, 16)
    except (ImportError, ValueError, AttributeError):
        return False
    return True


def _cache(name: str, model: PreTrainedModel, length: int) -> Any:
    config = model.config.get_text_config()
    if name == STATIC:
        return StaticCache(config=config, max_cache_len=length)
    if name == QUANTIZED:
        return QuantizedCache("quanto", config)
    return DynamicCache(config=config)


class Run:
    """A contestant's generation from one batch of prompts, which goes on as long as it is asked to."""

    def __init__(self, contestant: Contestant, prompt: Tensor, length: int) -> None:
        self.contestant = contestant
        self._stack = ExitStack()
        self._model = contestant.model
        batch, self._columns = prompt.shape
        names = list(islice(cycle(contestant.adapters), batch)) or None
        self._session = None
        if contestant.chunkwise is not None:
            self._session = self._stack.enter_context(
                contestant.chunkwise.stream(
                    batch=batch,
                    prompt_columns=self._columns,
                    adapter_names=names,
                    chunkwise_config=contestant.config,
                )
            )
            self.cache: Any = self._session.cache
        else:
            self.cache = _cache(contestant.name, self._model, length)
            if names is not None and contestant.name != BASE:
                # What PEFT's generate does once per call.
                self._stack.enter_context(self._model._enable_peft_forward_hooks(adapter_names=names))
        self._pieces = prompt.split(PREFILL_TOKENS if self._session else prompt.shape[1], dim=1)
        self._next = prompt[:, -1:]

    def close(self) -> None:
        """Leave the model free for another run."""
        self._stack.close()

    def prefill(self) -> float:
        """Run the prompts; returns ms."""
        start = _now(self._next.device)
        for piece in self._pieces:
            self._pass(piece)
        return (_now(self._next.device) - start) * 1e3

    def fill(self) -> None:
        """Instead of a prefill, which takes long, fill a cache of transformers with random states."""
        config = self._model.config.get_text_config()
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            shape = (len(self._next), heads, self._columns, width)
            states = torch.randn(shape, device=self._next.device).to(self._model.dtype)
            self.cache.update(states, states, layer, {"cache_position": torch.arange(self._columns)})

    def decode(self, steps: int) -> float:
        """Go on greedily; returns ms per step."""
        start = _now(self._next.device)
        for _ in range(steps):
            self._pass(self._next)
        return (_now(self._next.device) - start) * 1e3 / steps

    def _pass(self, tokens: Tensor) -> None:
        output = self._model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)

    @property
    def kv_bytes(self) -> int:
        """Bytes of storage of the cache."""
        if self._session is not None:
            return self.cache.nbytes
        tensors = (tensor for layer in self.cache.layers for tensor in vars(layer).values())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))

    @property
    def adapter_bytes(self) -> float:
        """Adapter bytes per pass."""
        if self._session is None:
            return float(self.contestant.adapter_bytes)
        trace = self._session.trace()
        return trace.adapter_bytes_read / trace.passes

    @property
    def scheduler_seconds(self) -> float:
        """Time spent in planning so far."""
        return 0.0 if self._session is None else self._session.trace().scheduler_seconds


@torch.inference_mode()
def measure(
    entrants: Sequence[Contestant],
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    prefill_rounds: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Prefill `prompt` (batch, tokens) and decode greedily, all contestants in turns, PEFT unmerged among them.

    A round of prefill starts anew; a round of decoding adds `new_tokens` to what the last prefill began, so that
    contexts grow alike and a long prompt is not run anew for every round. With no `prefill_rounds` the caches of
    contestants other than ours are filled with random states, which times a decode step just as well; then prefills are
    not compared. `advance` is called after every piece of work, max(prefill_rounds, 1) + rounds times per contestant.
    """
    prefill_rounds = rounds if prefill_rounds is None else prefill_rounds
    length = prompt.shape[1] + WARM_UP + rounds * new_tokens
    positions = getattr(entrants[0].model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise EngineError(
            f"a context of {prompt.shape[1]} with {rounds} rounds of {new_tokens} tokens comes to {length} tokens, but "
            f"the model has {positions} positions; lower one of them"
        )
    prefills: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    decodes: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    peaks: dict[str, int | None] = {}
    kv_bytes: dict[str, int] = {}
    runs: dict[str, Run] = {}
    try:
        for entrant in entrants:  # weights are read and kernels compiled before anything is measured
            run = Run(entrant, prompt[:, :8], 8 + WARM_UP)
            run.prefill()
            run.decode(WARM_UP)
            run.close()
        for turn in range(max(prefill_rounds, 1)):
            for entrant in _rotated(entrants, turn):
                if entrant.name in runs:
                    runs.pop(entrant.name).close()
                del run  # and with it its cache, before the peak is watched
                with PeakMemory(prompt.device) as peak:
                    run = runs[entrant.name] = Run(entrant, prompt, length)
                    if prefill_rounds or entrant.chunkwise is not None:
                        prefills[entrant.name].append(run.prefill())
                    else:
                        run.fill()
                    run.decode(WARM_UP)
                peaks[entrant.name] = peak.bytes
                kv_bytes[entrant.name] = run.kv_bytes
                advance()
        planned = {name: run.scheduler_seconds for name, run in runs.items()}
        for turn in range(rounds):
            for entrant in _rotated(entrants, turn):
                decodes[entrant.name].append(runs[entrant.name].decode(new_tokens))
                advance()
    finally:
        for run in runs.values():
            run.close()
    results = []
    for entrant in entrants:
        name, run = entrant.name, runs[entrant.name]
        ratios = _ratios(decodes[name], decodes[UNMERGED])
        quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        compared = prefill_rounds > 0
        results.append(
            Measurement(
                name=name,
                context=prompt.shape[1],
                batch=len(prompt),
                prefill_ms=statistics.median(prefills[name]) if prefills[name] else None,
                decode_ms=statistics.median(decodes[name]),
                decode_ratio=statistics.median(ratios),
                decode_spread=(quartiles[0], quartiles[2]),
                decode_over_base=_median_ratio(decodes, name, BASE),
                prefill_ratio=_median_ratio(prefills, name, UNMERGED) if compared else None,
                prefill_over_base=_median_ratio(prefills, name, BASE) if compared else None,
                adapter_bytes_per_pass=run.adapter_bytes,
                kv_bytes=kv_bytes[name],
                peak_bytes=peaks[name] if compared else None,
                scheduler_ms=(run.scheduler_seconds - planned[name]) * 1e3 / (rounds * new_tokens),
                rounds=rounds,
                prefill_rounds=prefill_rounds,
            )
        )
    return results


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(own, other, strict=True)]


def _median_ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> float | None:
    """Median over rounds, None where the other one does not take part."""
    return statistics.median(_ratios(times[name], times[other])) if other in times else None


def random_prompt(model: PreTrainedModel, batch: int, context: int) -> Tensor:
    """(batch, context) random token ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (batch, context), generator=generator)
    return ids.to(model.device)


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def _rotated(entrants: Sequence[Contestant], turn: int) -> Iterator[Contestant]:
    """The order rotates, so that no one always runs after the same neighbour."""
    first = turn % len(entrants)
    yield from (*entrants[first:], *entrants[:first])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
