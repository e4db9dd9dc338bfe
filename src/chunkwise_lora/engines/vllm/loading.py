"""Loads the ladder that a `LoRARequest` names by its path: the folder of a ladder or of a plain PEFT adapter."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from chunkwise_lora.engines.base import adapter_info, config_for, refuse_non_finite
from chunkwise_lora.engines.requested_config import Choice
from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder import LadderModule, RankLadder, is_ladder
from chunkwise_lora.ladder.adapter_files import AdapterFiles
from chunkwise_lora.ladder.format_v1 import read_policy
from chunkwise_lora.ladder.peft_adapter import PeftAdapter
from chunkwise_lora.ladder.rank_ladder import ladder_or_adapter
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.scheduler import NOTHING_LEARNED

logger = logging.getLogger("vllm.chunkwise")  # a child of vLLM's logger, so that its messages are shown like vLLM's


def load(path: str) -> RankLadder:
    """Load the ladder of a folder; a plain adapter becomes a ladder by SVD.

    Raises:
        LadderError: The folder cannot be read, is not plain LoRA, or replaces modules other than the head of a
            classifier, which vLLM cannot do for a single request.
    """
    found = ladder_or_adapter(path, None, None)
    if isinstance(found, RankLadder):
        ladder = found
    else:
        policy = read_policy(found.config_path.parent)
        ladder = replace(RankLadder.of_adapter(_factors_of(found)), policy=policy)
    _refuse_saved(ladder.saved_modules, path)
    refuse_non_finite(path, ladder)
    return ladder


def _factors_of(files: AdapterFiles) -> PeftAdapter:
    """Return the factors of a plain adapter.

    LoRA on an embedding has the shapes of LoRA on a linear layer with one input for each token id, and becomes that.

    Raises:
        LadderError: The adapter is not plain LoRA.
    """
    tensors = {re.sub(r"\.lora_embedding_([AB])$", r".lora_\1.weight", key): one for key, one in files.tensors.items()}
    return PeftAdapter.of(replace(files, tensors=tensors))


HEADS = ("score", "classifier")
"""Names of the heads of classifiers, which vLLM can replace for a single request."""


def _refuse_saved(saved_modules: Iterable[str], path: str) -> None:
    heads = {f"{head}.{parameter}" for head in HEADS for parameter in ("weight", "bias")}
    if names := ", ".join(sorted({*saved_modules} - heads)):
        raise LadderError(
            f"{path}: replaces {names} (modules_to_save), which vLLM cannot do for a single request; merge "
            "these into the base model, or train the adapter without modules_to_save"
        )


@dataclass(frozen=True)
class Checked:
    """What the front end needs to know about an adapter's folder."""

    config: ChunkWiseConfig
    """The config of requests that do not ask for another one."""
    rung_ranks: tuple[float, ...]
    """(rungs,) the mean rank of each rung."""
    rung_numbers: tuple[int, ...]
    """(rungs,) numbers in the factors at each rung."""


def check(path: str, server: Choice) -> Checked:
    """Check that the folder can be served, before an engine loads it.

    The files are read again only when they have changed.

    Raises:
        LadderError: As for `load`.
        ConfigError: The ladder's policy is damaged, or the server's config asks for what the ladder does not hold.
    """
    return _check(path, server, *_stamps(path))


def _stamps(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, time in nanoseconds and size in bytes of every file in the folder."""
    if not os.path.isdir(path):
        return
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            with suppress(FileNotFoundError):  # a writer has just replaced it
                state = entry.stat()
                yield entry.name, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=1024)
def _check(path: str, server: Choice, *stamps: tuple[str, int, int]) -> Checked:
    if not is_ladder(path):
        adapter = _factors_of(AdapterFiles.load(path))  # without the SVD, which only the worker needs
        if not adapter.of_ladder:
            _refuse_saved(adapter.saved_modules, path)
            return _checked(config_of(None, server, path), RankLadder.of_adapter(adapter, as_trained=True))
    ladder = load(path)
    return _checked(config_of(ladder, server, path), ladder)


def _checked(config: ChunkWiseConfig, ladder: RankLadder) -> Checked:
    numbers = adapter_info("", ladder, itemsize=1).rung_bytes
    return Checked(config, ladder.rung_ranks, tuple(numbers.tolist()))


def config_of(ladder: RankLadder | None, server: Choice, path: str) -> ChunkWiseConfig:
    """Return the config of requests that do not ask for another one. `ladder` is None for a plain adapter.

    Raises:
        ConfigError: The config needs what the ladder does not hold.
    """
    try:
        config = config_for(ladder, model=server.chosen)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if config.complexity.learned and ladder is None:
        raise ConfigError(f"{path}: {NOTHING_LEARNED}")
    return config


def prepared(module: LadderModule, dtype: torch.dtype) -> LadderModule:
    """Return the module with a copy of its factors in `dtype`, in the layout that CPU backends use without copying."""
    up = module.up.to(dtype).T.contiguous().T
    down = module.down.to(dtype, copy=True).contiguous()
    return LadderModule(up, down, module.sigma, module.ranks)


def off_memory(modules: Mapping[str, Sequence[LadderModule | None]]) -> dict[str, list[LadderModule | None]]:
    """Return modules, by layer, whose factors are in a temporary file without a name instead of memory.

    The system reads them from there when they are used, and may drop them from memory at any time. All factors have one
    dtype and the layout of `prepared`.

    Raises:
        OSError: There is no space in the folder for temporary files.
    """
    found = [module for of_layer in modules.values() for module in of_layer if module is not None]
    factors = [factor for module in found for factor in (module.down, module.up.T)]
    if not factors:
        return {layer: list(of_layer) for layer, of_layer in modules.items()}
    with tempfile.TemporaryFile() as file:
        for factor in factors:
            file.write(factor.contiguous().view(torch.uint8).numpy().tobytes())
        file.flush()
        content = torch.from_numpy(np.memmap(file, np.uint8, mode="c")).view(factors[0].dtype)
    parts = content.split([factor.numel() for factor in factors])
    stored = iter([part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)])

    def moved(module: LadderModule) -> LadderModule:
        return replace(module, down=next(stored), up=next(stored).T)

    return {
        layer: [None if module is None else moved(module) for module in of_layer] for layer, of_layer in modules.items()
    }


def kv_left_undone(config: KVCacheConfig, cache_dtype: str) -> list[str]:
    """Return the parts of a KV policy that vLLM cannot carry out, because its cache has one dtype and whole blocks.

    `cache_dtype` is vLLM's `--kv-cache-dtype`.
    """
    stored = "like the model" if cache_dtype == "auto" else f"as {cache_dtype}"
    policies = dict.fromkeys(level.evict for level in config.levels if level.evict is not None)
    wanted = {
        f"storing chunks as int8 (the whole cache is stored {stored}, as --kv-cache-dtype {cache_dtype} says)": any(
            level.precision == "int8" for level in config.levels
        ),
        "dropping near-duplicate keys": any(level.duplicate_similarity is not None for level in config.levels),
        f"dropping the tokens that a KV policy scores lowest ({', '.join(policies)})": bool(policies),
        "dropping chunks of the far past": any(level.max_age is not None for level in config.levels),
    }
    return [what for what, is_wanted in wanted.items() if is_wanted]


def note_kv_policy(name: str, config: KVCacheConfig, cache_dtype: str) -> None:
    """Log which parts of an adapter's KV policy are not carried out, if any."""
    if undone := kv_left_undone(config, cache_dtype):
        logger.warning(
            "ChunkWise LoRA: %s: vLLM keeps every entry of its KV cache, so these parts of its KV policy are "
            "not carried out: %s",
            name,
            "; ".join(undone),
        )
