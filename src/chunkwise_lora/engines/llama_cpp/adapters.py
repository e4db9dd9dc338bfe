"""The adapters that are loaded into a llama.cpp model: their factors, laid out as the C kernels read them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from chunkwise_lora.engines.base import adapter_info, refuse_non_finite
from chunkwise_lora.engines.llama_cpp.structs import ELEMENTS, TILE, Factors
from chunkwise_lora.errors import EngineError, LadderError
from chunkwise_lora.ladder import LadderModule, RankLadder
from chunkwise_lora.ladder.gguf import GgufBase, place
from chunkwise_lora.method.sequence import AdapterInfo

ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """One adapter's factors in one module; see `products.h`."""

    down: np.ndarray
    """(r, in)"""
    up: np.ndarray
    """(tiles, r, TILE), filled with zeros behind the last output."""
    scales: np.ndarray | None
    """(r,) float32 factor of each direction; None if it is 1."""
    ranks: np.ndarray
    """(rungs,) int32"""

    @classmethod
    def of(cls, name: str, module: LadderModule, element: str) -> ModuleFactors:
        """Lay out a module's factors in the element type `element`.

        Raises:
            EngineError: A number is beyond the range of float16.
        """
        module = module.to(torch.float16 if element == "float16" else torch.float32)
        down, up, scales = module.down.numpy(), module.up.numpy(), None
        if element == "int8":
            down, down_scales = _codes(down, axis=1)
            up, up_scales = _codes(up, axis=0)
            scales = down_scales[:, 0] * up_scales[0]
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise EngineError(f"{name}: its factors are beyond the range of float16; give factors='float32'")
        outputs, rank = up.shape
        tiles = np.zeros((-(-outputs // TILE) * TILE, rank), up.dtype)
        tiles[:outputs] = up
        tiles = np.ascontiguousarray(tiles.reshape(-1, TILE, rank).transpose(0, 2, 1))
        return cls(np.ascontiguousarray(down), tiles, scales, np.array(module.ranks, np.int32))

    @property
    def struct(self) -> Factors:
        """The addresses for C. They are valid as long as this object is."""
        scales = None if self.scales is None else self.scales.ctypes.data
        return Factors(self.down.ctypes.data, self.up.ctypes.data, scales, self.ranks.ctypes.data, len(self.down))


def _codes(factor: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a factor as int8 codes, and float32 scales along `axis` with which they are multiplied."""
    scales = np.abs(factor).max(axis, keepdims=True) / 127
    return np.rint(factor / np.where(scales == 0, 1, scales)).astype(np.int8), scales.astype(np.float32)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A ladder in memory. It does not change; an adapter of the same name that replaces it is another object."""

    ladder: RankLadder
    info: AdapterInfo
    modules: Mapping[str, ModuleFactors]
    """By the name of the weight in the GGUF file."""
    shapes: Mapping[str, tuple[int, int]]
    """(out, in) by the same names."""
    element: str
    """Element type of the factors."""

    @classmethod
    def load(cls, name: str, ladder: RankLadder, base: GgufBase, element: str) -> LoadedAdapter:
        """Lay out the factors of `ladder`, which users call `name`, for the base model.

        Raises:
            EngineError: The ladder does not fit the base model, by name or shape, or replaces parameters.
            LadderError: It holds NaN or infinity.
        """
        refuse_non_finite(f"adapter {name!r}", ladder)
        try:
            placed = place(ladder, base)
        except LadderError as error:
            raise EngineError(f"adapter {name!r}: {error}") from None
        modules = {tensor: ModuleFactors.of(f"{name}: {tensor}", placed[tensor], element) for tensor in sorted(placed)}
        key = f"{name}-{_digest(modules)}"
        return cls(
            ladder,
            adapter_info(key, ladder, ITEM_BYTES[element], name),
            modules,
            {tensor: (module.up.shape[0], module.down.shape[1]) for tensor, module in placed.items()},
            element,
        )

    @property
    def rungs(self) -> int:
        """Number of rungs of the ladder."""
        return len(self.info.rung_ranks)

    @property
    def rank(self) -> int:
        """Largest rank of a module."""
        return max(len(factors.down) for factors in self.modules.values())


def _digest(modules: Mapping[str, ModuleFactors]) -> str:
    """Identify factors by their content, so that a state that was saved with them is only used with the same ones."""
    digest = hashlib.blake2b(digest_size=12)
    for name, factors in modules.items():
        digest.update(name.encode())
        for array in (factors.down, factors.up, factors.scales, factors.ranks):
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def check_element(element: str) -> None:
    """Check the element type of factors.

    Raises:
        EngineError: It is unknown.
    """
    if element not in ELEMENTS:
        raise EngineError(f"factors={element!r}: choose one of {', '.join(ELEMENTS)}")


def shapes_of(adapters: Mapping[str, LoadedAdapter]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of all modules that any of the adapters has, in the order of their names."""
    shapes = {tensor: shape for adapter in adapters.values() for tensor, shape in adapter.shapes.items()}
    return dict(sorted(shapes.items(), key=lambda item: item[0].encode()))
