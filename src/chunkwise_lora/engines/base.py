"""The protocol of an engine, and what all engines share, such as the rule that decides which config applies."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.scheduler import NOTHING_LEARNED
from chunkwise_lora.method.sequence import AdapterInfo


@runtime_checkable
class Engine(Protocol):
    """Runs a model by the plans of a `BatchPlanner`.

    An engine (a) applies the gates of a plan, through a `Backend` or in its own way, (b) carries out the KV decisions
    that it can, and reports those that it cannot, (c) gives the entropies of its logits back to the planner, (d) runs
    many sequences in one batch, each with its own scheduler and the config of its own adapter, (e) costs no more than
    the base model and what the active rank needs, (f) gives the same answer for a sequence in every batch, and refuses
    a request that it cannot answer correctly.
    """

    @property
    def planner(self) -> BatchPlanner | None:
        """The planner of the running sequences; None if no sequence is running."""

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that this engine does not carry out, and the reasons."""


def config_for(
    ladder: RankLadder | None, *, call: ChunkWiseConfig | None = None, model: ChunkWiseConfig | None = None
) -> ChunkWiseConfig:
    """Return the config of a sequence: that of the call, or else of the model or server, or else the ladder's policy.

    If none of them is given, it is `lossless`. All engines use this function.

    Args:
        ladder: The sequence's ladder; None for the base model.
        call: The config given with the call or request.
        model: The config given for the whole model or server.

    Raises:
        ConfigError: The config needs what calibration learns, and the ladder does not hold it.
    """
    config = call or model or (ladder.policy if ladder is not None else None) or ChunkWiseConfig.preset("lossless")
    if config.complexity.learned and ladder is not None and ladder.learned is None:
        raise ConfigError(NOTHING_LEARNED)
    return config


def adapter_info(key: str, ladder: RankLadder, itemsize: int, name: str | None = None) -> AdapterInfo:
    """Return what planning needs to know about a ladder.

    Args:
        key: Identifies the adapter in the engine.
        ladder: The ladder.
        itemsize: Bytes per number of the factors on the device.
        name: What users call the adapter; by default its key.
    """
    costs = np.array([module.cost for module in ladder.modules.values()])
    ranks = np.array([module.ranks for module in ladder.modules.values()])
    return AdapterInfo(key, name or key, np.array(ladder.rung_ranks), costs @ ranks * itemsize, ladder.learned)


def entropies_of(logits: Tensor) -> Tensor:
    """Return (n,) float32 entropies in nats of the next-token distributions of logits (n, vocabulary)."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def refuse_non_finite(name: str, ladder: RankLadder) -> None:
    """Refuse a ladder that holds NaN or infinity.

    Raises:
        LadderError: A tensor holds NaN or infinity. The message names it.
    """
    factors = ((key, tensor) for key, module in ladder.modules.items() for tensor in (module.up, module.down))
    for key, tensor in (*factors, *ladder.saved_modules.items()):
        if not torch.isfinite(tensor).all():
            raise LadderError(f"{name}: {key} holds NaN or infinity; build the ladder again")
