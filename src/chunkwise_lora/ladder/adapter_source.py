"""What an engine loads: a LoRA adapter of any kind, as PEFT's config and tensors, and its ladder if it has one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from chunkwise_lora.errors import LadderError, first_line, shown
from chunkwise_lora.ladder import format_v1
from chunkwise_lora.ladder.adapter_config import check_sizes, refuse_changed_base
from chunkwise_lora.ladder.backtracking import refuse_backtracking_in
from chunkwise_lora.ladder.peft_files import peft_config, peft_tensors
from chunkwise_lora.ladder.rank_ladder import RankLadder, ladder_or_adapter
from chunkwise_lora.method.config import ChunkWiseConfig

FIELDS = frozenset(field.name for field in fields(LoraConfig) if field.init) - {"runtime_config"}
"""Fields of `adapter_config.json` that mean something to the installed PEFT."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that PEFT can load: `LoraConfig(**config)`, then `add_adapter` and `set_peft_model_state_dict`."""

    config: dict[str, Any]
    """Fields of PEFT's `LoraConfig`."""
    tensors: dict[str, Tensor]
    """The adapter's tensors by the keys that PEFT gives them when it saves an adapter."""
    ladder: RankLadder | None = None
    """The ladder, if the folder holds one. Then `config` and `tensors` are those of the ladder at full rank."""
    policy: ChunkWiseConfig | None = None
    """The policy of the ladder, or the one next to a plain adapter."""

    @classmethod
    def load(cls, adapter: str | Path, revision: str | None = None, subfolder: str | None = None) -> AdapterSource:
        """Read an adapter or a ladder from a folder, or by its name on the hub.

        Args:
            adapter: The folder, or the name on the hub.
            revision: Branch, tag or commit on the hub.
            subfolder: The folder inside `adapter` that holds the adapter. If only one folder inside holds one, it need
                not be given.

        Raises:
            LadderError: A file is missing or damaged, the weights are pickled, the adapter is not a LoRA adapter, or
                PEFT would have to change the base model for it.
            ConfigError: The policy is damaged.
        """
        found = ladder_or_adapter(adapter, revision, subfolder)
        if isinstance(found, RankLadder):
            return cls.of(found)
        where = str(found.config_path)
        refuse_changed_base(found.config, where)
        refuse_backtracking_in(found.config, where)
        check_sizes(found.config, found.tensors, where)
        policy = format_v1.read_policy(found.config_path.parent)
        return cls(_known_fields(found.config, where), found.tensors, None, policy)

    @classmethod
    def of(cls, ladder: RankLadder) -> AdapterSource:
        """Return a ladder at full rank as an adapter.

        Raises:
            LadderError: A name of a replaced module is a regular expression that could keep PEFT busy for hours.
        """
        config = peft_config(ladder)
        refuse_backtracking_in(config, "the ladder's config")
        return cls(config, peft_tensors(ladder), ladder, ladder.policy)


def _known_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that PEFT knows, after a check that `LoraConfig` accepts them."""
    known = {name: value for name, value in config.items() if name in FIELDS}
    known["inference_mode"] = True
    unknown = {name: value for name, value in config.items() if name not in FIELDS and value}
    unknown.pop("runtime_config", None)
    if unknown:
        warnings.warn(
            f"{where}: the installed PEFT does not know {shown(', '.join(sorted(unknown)))}, which is ignored; if a "
            "newer PEFT saved the adapter, install that one",
            stacklevel=3,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT repeats them when the adapter is added
            LoraConfig(**known)
    except Exception as error:  # a field of a wrong type can raise anything
        raise LadderError(f"{where}: PEFT refuses the config ({shown(first_line(error))}); correct it") from None
    return known
