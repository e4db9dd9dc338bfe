"""The methods that are measured: the base model without an adapter, PEFT merged and unmerged, and ChunkWise."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.fitting import only_device_of
from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.ladder.backtracking import refuse_backtracking
from chunkwise_lora.method.config import ChunkWiseConfig

BASE, MERGED, UNMERGED = "base, no adapter", "PEFT merged", "PEFT unmerged"
STATIC, QUANTIZED = "PEFT unmerged, static cache", "PEFT unmerged, quantized cache"


@dataclass
class Method:
    """A way to run adapters on a base model. All methods except ChunkWise are baselines."""

    name: str
    model: Any
    """What is called with token ids: a transformers model or a `PeftModel`."""
    adapter_bytes: int = 0
    """Bytes of adapter weights that a baseline reads per decode step for one sequence. ChunkWise counts its own."""
    chunkwise: ChunkWiseModel | None = None
    """Set for ChunkWise, None for a baseline."""
    config: ChunkWiseConfig | None = None
    """The settings that ChunkWise runs with."""
    adapters: tuple[str, ...] = ()
    """Adapter names that the sequences of a batch use in turn. Empty if all sequences use the only adapter."""


def methods(
    base: PreTrainedModel,
    adapters: Mapping[str, str | Path],
    presets: Mapping[str, ChunkWiseConfig],
    *,
    ladders: Mapping[str, RankLadder] | None = None,
    caches: bool = False,
    fast: FastPaths | None = None,
) -> list[Method]:
    """The base model, PEFT merged, PEFT unmerged, and ChunkWise once per preset, all in the base model's dtype.

    All of them share the weights of the base model, except the merged one.

    Args:
        base: The base model, without an adapter, on one device.
        adapters: Folders of PEFT adapters by name. With several, the sequences of a batch use them in turn, and there
            is no merged method.
        presets: Settings of ChunkWise by the name that the results show.
        ladders: The ladders of the adapters by name. By default they are loaded from the folders in `adapters`.
        caches: Also measure PEFT unmerged with the static and the quantised cache of transformers, if they can run.
        fast: The fast paths that ChunkWise may use. By default all that this machine allows.

    Raises:
        EngineError: The base model is spread over devices.
    """
    only_device_of(base)
    for folder in adapters.values():
        refuse_backtracking(folder)
    (first, folder), *others = adapters.items()
    unmerged = PeftModel.from_pretrained(
        sharing_weights(base), folder, adapter_name=first, autocast_adapter_dtype=False
    ).eval()
    for name, folder in others:
        unmerged.load_adapter(folder, name, autocast_adapter_dtype=False)
    unmerged.to(base.dtype)
    weights = [(name, parameter.nbytes) for name, parameter in unmerged.named_parameters() if "lora_" in name]
    adapter_bytes = sum(nbytes for name, nbytes in weights if f".{first}." in name)
    names = tuple(adapters) if others else ()
    found = [Method(BASE, base)]
    if not others:
        found.append(Method(MERGED, copy.deepcopy(unmerged).merge_and_unload()))
    unmerged_names = [UNMERGED, *((STATIC, QUANTIZED) if caches else ())]
    found += [Method(name, unmerged, adapter_bytes, adapters=names) for name in unmerged_names if _can_run(name, base)]
    sources = ladders or {name: RankLadder.load(path) for name, path in adapters.items()}
    for name, config in presets.items():
        chunkwise = ChunkWiseModel(sharing_weights(base), sources, config, fast)
        found.append(Method(f"ChunkWise {name}", chunkwise.base, chunkwise=chunkwise, config=config, adapters=names))
    return found


def chosen(all_methods: Sequence[Method], beginnings: Sequence[str]) -> list[Method]:
    """PEFT unmerged, which all are compared with, and the methods whose names begin with one of `beginnings`.

    Raises:
        ChunkWiseError: No method begins with one of them.
    """
    names = [method.name for method in all_methods]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise ChunkWiseError(f"--methods {beginning}: no method begins with this; there are {', '.join(names)}")
    return [method for method in all_methods if method.name.startswith((UNMERGED, *beginnings))]


def cache_for(name: str, model: PreTrainedModel, length: int) -> Any:
    """An empty cache of transformers for the baseline `name`. A static cache gets room for `length` tokens.

    Raises:
        ImportError, ValueError, AttributeError: This kind of cache needs a package that is not installed, or does not
            support the model.
    """
    config = model.config.get_text_config()
    if name == STATIC:
        return StaticCache(config=config, max_cache_len=length)
    if name == QUANTIZED:
        return QuantizedCache("quanto", config)
    return DynamicCache(config=config)


def _can_run(name: str, model: PreTrainedModel) -> bool:
    """Whether this machine can make the cache of the baseline `name` for this model."""
    try:
        cache_for(name, model, 16)
    except (ImportError, ValueError, AttributeError):
        return False
    return True


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules that uses the same weights."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)
