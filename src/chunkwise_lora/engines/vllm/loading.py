"""Loads the ladder that a `LoRARequest` names by its path: the folder of a ladder or of a plain PEFT adapter."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache

import torch

from chunkwise_lora.engines.base import config_for, refuse_non_finite
from chunkwise_lora.engines.requested_config import Choice
from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder import LadderModule, RankLadder, is_ladder
from chunkwise_lora.ladder.peft_adapter import PeftAdapter
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.scheduler import NOTHING_LEARNED

logger = logging.getLogger("vllm.chunkwise")  # a child of vLLM's logger, so that its messages are shown like vLLM's


def load(path: str) -> RankLadder:
    """Load the ladder of a folder; a plain adapter becomes a ladder by SVD.

    Raises:
        LadderError: The folder cannot be read, is not plain LoRA, or replaces whole modules, which vLLM cannot do for a
            single request.
    """
    ladder = RankLadder.load(path)
    _refuse_saved(ladder.saved_modules, path)
    refuse_non_finite(path, ladder)
    return ladder


def _refuse_saved(saved_modules: Iterable[str], path: str) -> None:
    if names := ", ".join(sorted(saved_modules)):
        raise LadderError(
            f"{path}: replaces {names} (modules_to_save), which vLLM cannot do for a single request; merge "
            "these into the base model, or train the adapter without modules_to_save"
        )


def check(path: str, server: Choice) -> ChunkWiseConfig:
    """Check that the folder can be served, before an engine loads it.

    The files are read again only when they have changed.

    Returns:
        The config of requests that do not ask for another one.

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
def _check(path: str, server: Choice, *stamps: tuple[str, int, int]) -> ChunkWiseConfig:
    if not is_ladder(path):
        adapter = PeftAdapter.load(path)  # without the SVD, which only the worker needs
        if not adapter.of_ladder:
            _refuse_saved(adapter.saved_modules, path)
            return config_of(None, server, path)
    return config_of(load(path), server, path)


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
