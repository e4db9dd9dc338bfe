"""What an export must know of the base model, read from its transformers config or from its GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkwise_lora.errors import LadderError, first_line, shown
from chunkwise_lora.ladder.gguf.architectures import ARCHITECTURES, Architecture
from chunkwise_lora.ladder.gguf.header import GgufHeader

MOST_BLOCKS = 1024
"""Bound on the layers of a model. The deepest have about 130."""


@dataclass(frozen=True)
class GgufBase:
    """The facts about a base model that decide where its modules lie in a GGUF file."""

    source: str
    """Where the facts come from, for messages: a folder, a name on the hub or a file."""
    architecture: Architecture
    blocks: int
    """Number of layers."""
    heads: int
    """Query heads per layer."""
    kv_heads: int
    """Key-value heads per layer."""
    width: int
    """Size of the hidden state."""
    tied: bool
    """Whether the output layer is the embedding matrix. Then the GGUF file has no tensor of its own for it."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Shapes by tensor name, (out, in) for a linear module. None if they are not known."""

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise LadderError(f"{self.source}: {self.blocks} layers, not 1 to {MOST_BLOCKS}; get the base model again")

    @classmethod
    def load(cls, source: str | Path) -> GgufBase:
        """Read a base model: a GGUF file, a folder with a config.json, or a name on the hub.

        Only the config and the header are read, not the weights.

        Raises:
            LadderError: It cannot be read, or adapters for its architecture cannot be exported.
        """
        if os.path.isfile(source) or str(source).endswith(".gguf"):
            return _from_gguf(Path(source))
        return _from_config(str(source))


def _from_config(source: str) -> GgufBase:
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(source)
        config = whole.get_text_config()
    except Exception as error:  # a damaged config raises many kinds of errors
        raise LadderError(
            f"{source}: the config of the base model cannot be read ({first_line(error)}); give the base model's "
            "folder, its name on the hub or its GGUF file as base (--base)"
        ) from None
    heads = config.num_attention_heads
    kind = whole.model_type if whole.model_type in ARCHITECTURES else config.model_type
    return GgufBase(
        source,
        _known(source, "model_type", kind, ARCHITECTURES),
        config.num_hidden_layers,
        heads,
        _kv_heads(config, heads),
        config.hidden_size,
        bool(whole.tie_word_embeddings),
    )


def _kv_heads(config: Any, heads: int) -> int:
    if config.model_type in ("bloom", "gpt_neox"):  # these models do not read num_key_value_heads
        return heads
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else heads
    return getattr(config, "num_key_value_heads", None) or heads


def _from_gguf(path: Path) -> GgufBase:
    header = GgufHeader.read(path)
    fields = header.fields
    if fields.get("general.type", "model") != "model":
        raise LadderError(
            f"{path}: its general.type is '{shown(fields['general.type'])}', not 'model'; give the base model's file"
        )
    by_name = {known.name: known for known in ARCHITECTURES.values()}
    architecture = _known(str(path), "general.architecture", fields.get("general.architecture"), by_name)

    def number(key: str, default: int | None = None) -> int:
        value = fields.get(f"{architecture.name}.{key}", default)
        if not isinstance(value, int) or value < 1:
            raise LadderError(
                f"{path}: its {architecture.name}.{key} is {shown(value)}, not a positive number; convert the base "
                "model again, or give its transformers folder as base (--base)"
            )
        return value

    heads = number("attention.head_count")
    whole = fields.get("split.count", 1) in (0, 1)  # otherwise this file holds only some of the tensors
    return GgufBase(
        str(path),
        architecture,
        number("block_count"),
        heads,
        number("attention.head_count_kv", heads),
        number("embedding_length"),
        whole and "output.weight" not in header.shapes,
        header.shapes if whole else None,
    )


def _known(source: str, key: str, value: Any, known: Mapping[str, Architecture]) -> Architecture:
    if value not in known:
        raise LadderError(
            f"{source}: adapters for {key} '{shown(value)}' cannot be exported to GGUF; known are {', '.join(known)}. "
            "Merge the adapter into the model and convert the whole model instead"
        )
    return known[value]
