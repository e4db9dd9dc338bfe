"""Writes a ladder as a GGUF LoRA adapter.

llama.cpp computes y += (alpha / r) B (A x) with r from the shape of each B, and one alpha for the whole file. alpha is
the highest rank here, and each B is multiplied by r / alpha. So the scale of every module is 1, whatever its rank.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from chunkwise_lora.errors import LadderError, first_line
from chunkwise_lora.files import write_atomically
from chunkwise_lora.ladder.contents import LadderContents
from chunkwise_lora.ladder.gguf.base import GgufBase
from chunkwise_lora.ladder.gguf.header import GgufHeader
from chunkwise_lora.ladder.gguf.placement import place
from chunkwise_lora.ladder.module import LadderModule

FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
DTYPES = tuple(FILE_TYPES)
"""Number formats of the factors. `f32` holds every ladder exactly; `f16` takes half of its bytes, `q8_0` about a
quarter if the ranks are multiples of 32. Other ranks do not fill the blocks of `q8_0`; their B is written as `f16`."""

BLOCK = 32
"""Numbers of a row that share a scale in `q8_0`."""


def write_gguf(
    ladder: LadderContents, path: str | Path, *, base: str | Path | GgufBase | None = None, dtype: str = "f32"
) -> None:
    """Write a ladder at full rank as a GGUF LoRA adapter, which llama.cpp and programs built on it can run.

    Use `RankLadder.truncated` first for a lower rank. Modules may differ in rank.

    Args:
        ladder: The ladder to write.
        path: The file. It is replaced in one step; an interrupted write leaves the old file unchanged.
        base: The base model: a folder, a name on the hub, or its GGUF file (then names and shapes are checked against
            it). By default the one that the ladder names.
        dtype: Number format of the factors: `f32`, `f16` or `q8_0`.

    Raises:
        LadderError: The base model cannot be read or is not known to llama.cpp, parts of the ladder have no place in a
            GGUF adapter, a number is beyond the range of the format, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise LadderError(f"factors cannot be written as '{dtype}'; choose one of {', '.join(DTYPES)}")
    _check_target(Path(path))
    facts = base if isinstance(base, GgufBase) else GgufBase.load(_named(ladder, base))
    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        file = Path(folder) / "adapter.gguf"
        try:
            _write(ladder, file, facts, dtype)
        except OSError as error:
            raise LadderError(f"{path}: cannot be written, because {folder} cannot ({first_line(error)})") from None
        write_atomically(Path(path), file.read_bytes(), LadderError)


def _named(ladder: LadderContents, base: str | Path | None) -> str | Path:
    if base is None and not ladder.base_model:
        raise LadderError(
            "the ladder does not name its base model; give its folder, its name on the hub or its GGUF file as base "
            "(--base)"
        )
    return base or ladder.base_model or ""


def _check_target(path: Path) -> None:
    """Refuse to replace anything but a GGUF adapter: a base model, for example, is often named alike."""
    if path.is_dir():
        raise LadderError(f"{path}: is a folder; give a file in it, such as {path / 'adapter.gguf'}")
    if path.is_file() and not _is_adapter(path):
        raise LadderError(f"{path}: exists and is not a GGUF adapter; give another file, or remove this one first")


def _is_adapter(path: Path) -> bool:
    try:
        return GgufHeader.read(path).fields.get("general.type") == "adapter"
    except LadderError:  # another or a damaged file
        return False


def _write(ladder: LadderContents, file: Path, base: GgufBase, dtype: str) -> None:
    modules = place(ladder, base)
    alpha = max(module.rank for module in modules.values())
    writer = GGUFWriter(file, base.architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, module in modules.items():
        scaled = replace(module, up=module.up.float() * (module.rank / alpha), down=module.down.float())
        ready = _in_range(scaled, dtype)
        _add(writer, f"{name}.lora_a", ready.down, dtype)
        _add(writer, f"{name}.lora_b", ready.up, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_range(module: LadderModule, dtype: str) -> LadderModule:
    """Return the same product in factors that suit the format's range."""
    if dtype == "f16":
        return module.to(torch.float16)
    return _levelled(module) if dtype == "q8_0" else module


def _levelled(module: LadderModule) -> LadderModule:
    """Give all columns of `up` the same largest magnitude, which is that of the strongest direction in `down`.

    Directions share the scales of their blocks in `up`, so a short column would lose its digits beside a long one.
    """
    longest = module.up.abs().amax(0)
    level = (longest * module.down.abs().amax(1)).amax().sqrt()
    factor = torch.where(level * longest > 0, level / longest, 1)
    return replace(module, up=module.up * factor, down=module.down / factor[:, None])


def _add(writer: GGUFWriter, name: str, factor: Tensor, dtype: str) -> None:
    if dtype == "q8_0" and factor.shape[1] % BLOCK == 0:
        q8_0 = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(factor.numpy(), q8_0), raw_dtype=q8_0)
        return
    stored = factor if dtype == "f32" else factor.half()
    if not stored.isfinite().all():
        raise LadderError(f"{name}: its numbers are beyond the range of {dtype}; write f32")
    writer.add_tensor(name, stored.contiguous().numpy())
