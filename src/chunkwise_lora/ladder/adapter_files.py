"""Reads the files of a PEFT LoRA adapter, of any kind, from a folder or the hub. Pickled weights are never opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.adapter_config import check_config
from chunkwise_lora.ladder.adapter_keys import peft_keys, resized_embeddings
from chunkwise_lora.ladder.adapter_location import files_in, find_folder
from chunkwise_lora.ladder.checks import SHARDED, check_tensor
from chunkwise_lora.ladder.folder import is_ladder
from chunkwise_lora.ladder.hub import adapter_on_hub
from chunkwise_lora.ladder.mlx import from_mlx, is_mlx
from chunkwise_lora.ladder.reading import LARGEST_JSON, parse_json, parse_tensors, read_file
from chunkwise_lora.ladder.whole_folder import read_folder

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes in which an adapter may be stored."""

WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Dtypes that the buffers of replaced modules may have, too."""


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's files, checked and in the form that PEFT writes."""

    config: dict[str, Any]
    """Fields of `adapter_config.json`. Embeddings that are stored only because the vocabulary was resized are in
    `modules_to_save` here, so that PEFT keeps those of the base."""
    tensors: dict[str, Tensor]
    """The tensors by the keys that PEFT gives them when it saves an adapter."""
    config_path: Path
    weights_path: Path
    of_ladder: bool
    """Whether the folder holds a ladder, whose weights at full rank these are."""

    @classmethod
    def load(cls, adapter: str | Path, revision: str | None = None, subfolder: str | None = None) -> AdapterFiles:
        """Read an adapter from a folder, or by its name on the hub.

        Raises:
            LadderError: A file is missing or damaged, the weights are pickled, or the adapter is not a LoRA adapter.
        """
        folder = find_folder(adapter, subfolder)
        if folder is None:
            of_ladder = False
            raw_config, config_path, raw_weights, weights_path = _read(
                *adapter_on_hub(str(adapter), revision, subfolder)
            )
        else:
            (raw_config, config_path, raw_weights, weights_path), of_ladder = read_folder(
                folder, lambda: (_read(*files_in(folder)), is_ladder(folder)), self_checking=False
            )
        config, tensors = parse_json(raw_config, config_path), parse_tensors(raw_weights, weights_path)
        if is_mlx(tensors):
            config, tensors = from_mlx(config, tensors, config_path)
        check_config(config, config_path)
        tensors = peft_keys(tensors, config, weights_path)
        _check_tensors(tensors, weights_path)
        replaced = [*(config.get("modules_to_save") or []), *resized_embeddings(tensors, config)]
        return cls({**config, "modules_to_save": replaced or None}, tensors, config_path, weights_path, of_ladder)


def _read(config: Path, weights: Path) -> tuple[bytes, Path, bytes, Path]:
    return read_file(config, LARGEST_JSON), config, read_file(weights), weights


def _check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    if not any(".lora_" in name for name in tensors):
        raise LadderError(f"{path}: holds no LoRA weights; give the file that save_pretrained of a PEFT model writes")
    for name, tensor in tensors.items():
        if tensor.ndim < 2 and name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise LadderError(f"{path}: {name} has shape {list(tensor.shape)}. {SHARDED}")
        check_tensor(f"{path}: {name}", tensor, dtypes=DTYPES if ".lora_" in name else DTYPES + WHOLE_NUMBERS)
