"""Runs adapters by llama.cpp's own LoRA, where our kernels cannot run: on a GPU, or without a C compiler.

Then a request has one rung, because llama.cpp builds its graph again for every change.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkwise_lora.backends.native.build import BuildError
from chunkwise_lora.engines.llama_cpp.adapters import LoadedAdapter
from chunkwise_lora.engines.llama_cpp.carrier import Carrier
from chunkwise_lora.engines.llama_cpp.graph import Graph
from chunkwise_lora.engines.llama_cpp.kernels import functions
from chunkwise_lora.engines.llama_cpp.library import ggml_function
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder.gguf import GgufBase, write_gguf
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.segments import PassPlan

logger = logging.getLogger(__name__)


def why_no_kernels(n_gpu_layers: int) -> str | None:
    """Return why our kernels cannot run in a model with `n_gpu_layers` layers on a GPU; None if they can."""
    if n_gpu_layers:
        return f"n_gpu_layers is {n_gpu_layers}, and our kernels run on the CPU"
    if ggml_function("ggml_backend_dev_count", int)() > 1:
        return "this llama.cpp computes on other devices than the CPU, too"
    try:
        functions()
    except BuildError as error:
        return str(error)
    return None


class OwnLora:
    """The adapters of one context, run by llama.cpp's own LoRA. It takes the place of `Graph`.

    Args:
        reason: Why it is used.
    """

    attentions = 0

    def __init__(self, reason: str) -> None:
        self.notes = (
            "one rung for each request, the highest of its levels, with scale 1, factors in float16 and no KV policy: "
            f"{reason}",
        )
        self._carrier: Carrier | None = None
        self._base: GgufBase | None = None
        self._adapters: Mapping[str, LoadedAdapter] = {}
        self._running: tuple[str, int] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="chunkwise-", ignore_cleanup_errors=True)
        logger.warning("%s", self.notes[0])

    def observe(self, context_params: Any) -> None:
        """Do nothing: llama.cpp's graphs stay as they are."""

    def attach(self, carrier: Carrier, base: GgufBase) -> None:
        """Set the adapters of a model by `carrier`; `base` says where its modules are."""
        self._carrier, self._base = carrier, base

    def install(self, adapters: Mapping[str, LoadedAdapter]) -> None:
        """Run with these adapters from the next pass on."""
        assert self._carrier is not None
        self._carrier.use(None)
        self._adapters, self._running = dict(adapters), None

    def begin(self, tokens: Sequence[int], plan: PassPlan) -> None:
        """Let llama.cpp run the rung of a pass.

        Raises:
            EngineError: The sequences of the pass do not have the same adapter and rung.
        """
        assert self._carrier is not None
        if not plan.is_uniform:
            raise EngineError(f"all sequences of a pass must have the same adapter and rung; {self.notes[0]}")
        wanted = next(((segment.adapter, segment.rung) for segment in plan.segments), None)
        if wanted != self._running:
            self._carrier.use(None if wanted is None else self._file(*wanted))
            self._running = wanted

    def finish(self) -> None:
        """Do nothing."""

    def entropy(self, logits: Any, count: int) -> float:
        """Never called: a plan of one rung does not read entropies."""
        raise NotImplementedError

    def _file(self, key: str, rung: int) -> Path | None:
        """Return the GGUF file of a rung; None for rank 0."""
        adapter = self._adapters[key]
        share = adapter.ladder.rung_ranks[rung] / adapter.ladder.rung_ranks[-1]
        if not share:
            return None
        path = Path(self._folder.name) / f"{key.rpartition('-')[2]}-{rung}.gguf"
        if not path.exists():
            write_gguf(adapter.ladder.truncated(share), path, base=self._base, dtype="f16")
        return path


def runner(element: str, n_gpu_layers: int) -> Graph | OwnLora:
    """Return what runs the adapters of a model: our kernels if they can, otherwise llama.cpp's own LoRA."""
    reason = why_no_kernels(n_gpu_layers)
    return Graph(element) if reason is None else OwnLora(reason)


def one_rung(config: ChunkWiseConfig) -> ChunkWiseConfig:
    """Return settings that give every token the highest rank that `config` may give."""
    return ChunkWiseConfig.uniform(max(config.selection.rank_shares))
