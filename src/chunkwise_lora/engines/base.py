"""What every engine owes, and what all engines share: which config applies, and what planning must know of a ladder."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.sequence import AdapterInfo

NOTHING_LEARNED = (
    "the config sets complexity.learned, but the ladder holds nothing learned; run `chunkwise calibrate` for this "
    "adapter, or choose a preset"
)


@runtime_checkable
class Engine(Protocol):
    """Runs a model by the plans of a `BatchPlanner`.

    An engine (a) applies the gates of a plan, through a `Backend` or in its own way, (b) carries out the KV decisions
    that it can, and names those that it cannot, (c) gives the entropies of its logits back to the planner, (d) keeps
    many sequences in one batch, each with its own scheduler and the config of its own adapter, (e) costs no more than
    the base model and what the active rank needs, (f) gives the same answer whatever else runs beside it, and refuses
    rather than answers wrongly.
    """

    @property
    def planner(self) -> BatchPlanner | None:
        """The planner of the sequences that are being run; None while there are none."""

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """What of a KV policy this engine does not carry out, and why."""


def config_for(
    ladder: RankLadder | None, *, call: ChunkWiseConfig | None = None, model: ChunkWiseConfig | None = None
) -> ChunkWiseConfig:
    """The config of a sequence: the first that is given of the call's, the model's or server's, and the ladder's
    policy.

    Without any it is `lossless`. All engines decide by this function.

    Args:
        ladder: The sequence's own ladder; None for the base model.
        call: Given with the call or the request.
        model: Given for the whole model or server.

    Raises:
        ConfigError: The config needs what calibration learns, and the ladder does not hold it.
    """
    config = call or model or (ladder.policy if ladder is not None else None) or ChunkWiseConfig.preset("lossless")
    if config.complexity.learned and ladder is not None and ladder.learned is None:
        raise ConfigError(NOTHING_LEARNED)
    return config


def adapter_info(key: str, ladder: RankLadder, itemsize: int, name: str | None = None) -> AdapterInfo:
    """What planning must know of a ladder.

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
    """(n,) float32 entropies in nats of the distributions that logits (n, vocabulary) stand for."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def refuse_non_finite(name: str, ladder: RankLadder) -> None:
    """Refuse a ladder that holds NaN or infinity.

    Raises:
        LadderError: It does. The error names the tensor.
    """
    factors = ((key, tensor) for key, module in ladder.modules.items() for tensor in (module.up, module.down))
    for key, tensor in (*factors, *ladder.saved_modules.items()):
        if not torch.isfinite(tensor).all():
            raise LadderError(f"{name}: {key} holds NaN or infinity; build the ladder anew")
