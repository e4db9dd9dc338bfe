"""How many positions a model has, and what happens to sequences that are longer."""

from __future__ import annotations

import logging
import math
from functools import cache

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chunkwise_lora.errors import EngineError

logger = logging.getLogger(__name__)

_FIRST_ROWS = 2
"""OPT and others keep up to this number of rows before the first position."""


def tabled_positions(model: PreTrainedModel) -> float:
    """Return the number of positions in the model's tables of positions; infinite if it computes its positions.

    A table is a learned embedding (GPT-2, OPT), or a buffer that the model reads by position (GPT-J).
    """
    positions = trained_positions(model.config)
    if positions is None:
        return math.inf
    tokens = model.get_input_embeddings()
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and _is_table(name, module.weight, positions):
            return positions
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if _is_table(buffer_name, buffer, positions):
                return positions
    return math.inf


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Check a prompt of `longest` tokens against the model's positions.

    Models with rotary embeddings compute positions and can go past the length of their training, as in transformers.
    The first prompt that does so is logged.

    Raises:
        EngineError: The model has a table of positions, and the prompt has more tokens than the table.
    """
    trained = trained_positions(model.config)
    if trained is None or longest <= trained:
        return
    if longest > tabled_positions(model):
        raise EngineError(f"a prompt has {longest} tokens, but the model has {trained} positions; shorten the prompt")
    _warn_once(type(model).__name__, trained)


def trained_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the config states; None if it states none, as for ALiBi."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _is_table(name: str, table: Tensor, positions: int) -> bool:
    last = name.rpartition(".")[2]
    return ("pos" in last or last == "wpe") and table.ndim == 2 and 0 <= len(table) - positions <= _FIRST_ROWS


@cache
def _warn_once(model: str, positions: int) -> None:
    logger.warning("a prompt is longer than the %d positions that %s was configured for", positions, model)
