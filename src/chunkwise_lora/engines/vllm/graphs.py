"""Plans in vLLM's CUDA graphs. A replay runs no Python code, so what changes from pass to pass lies on the device.

A graph is captured for a number of tokens, once with adapters and once without. Each number of tokens has a fixed pass
of the backend: the graph launches the kernels for all blocks that it may need, and these read the blocks' tokens,
adapters and gates from the fixed pass, which is filled with the plan before each replay. They read the addresses and
ranks of factors from the layers' tables, in which adapters are loaded, replaced, made smaller and removed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.logger import init_logger

from chunkwise_lora.backends import AnyBackend
from chunkwise_lora.engines.vllm.layers import RunningPass
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import PassPlan

if TYPE_CHECKING:
    from chunkwise_lora.backends.triton.backend import TritonBackend, TritonPass

logger = init_logger("vllm.chunkwise")


class GraphPass(RunningPass):
    """The running pass of a model that vLLM captures as CUDA graphs. `choose` and `forward` wrap methods of its runner.

    Raises:
        EngineError: The backend is not that of Triton's kernels.
    """

    backend: TritonBackend

    def __init__(self, backend: AnyBackend) -> None:
        if backend.name != "triton":
            raise EngineError(f'the backend {backend.name} does not run in CUDA graphs; leave out "cuda_graphs"')
        super().__init__(backend)
        self._fixed: dict[int, TritonPass] = {}
        """By number of tokens, padding included: the pass that the graphs of this size have captured."""
        self._layout = 0
        """The layout of the backend's tables that the graphs have captured."""

    def reserve(self, sizes: Iterable[int]) -> None:
        """Reserve memory for graphs of these numbers of tokens, after all layers are known and before a capture.

        If a graph captured the creation of its tensors, each replay would empty them.
        """
        self._fixed = {tokens: self.backend.fixed_pass(tokens) for tokens in sizes}
        self._layout = self.backend.layout

    def plan(self, plan: PassPlan, last: np.ndarray) -> None:
        """Set the plan that all layers follow in this pass, and log why it cannot run as a graph, if it cannot."""
        super().plan(plan, last)
        if self.backend.layout != self._layout:
            logger.warning_once(
                "ChunkWise LoRA: CUDA graphs are not used any more, because an adapter has a higher rank or more rungs "
                "than they have room for; start the server with a higher --max-lora-rank"
            )
        elif self._embedded is not None:
            logger.info_once("ChunkWise LoRA: passes with adapters of the token embedding run without CUDA graphs")

    def choose(self, original: Callable[..., Any], **options: Any) -> Any:
        """Choose a graph for a pass, or none if graphs cannot run its plan."""
        return original(**options if self._fits_graphs else {**options, "force_eager": True})

    def forward(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run the model on a planned pass. If it runs as a graph, the graph follows the plan.

        vLLM's own passes, for warm-up, capture or to keep step with other ranks, do not call this. They may replay an
        earlier plan of the same size; nobody reads the result.

        Raises:
            EngineError: The graph would not run the plan.
        """
        graph = _running_graph()
        if graph is not None and self._plan is not None:
            if not self._fits_graphs or (self._plan.segments and not graph.has_lora):
                raise EngineError(f"the CUDA graph {graph} cannot run adapters {', '.join(self._plan.adapters)}")
            if graph.has_lora:
                self.backend.refill(self._fixed_pass(graph.num_tokens), self._plan)
        return original(*arguments, **options)

    def add(self, layer: Any, y: Tensor, x: Tensor) -> None:
        """Add the adapter product for x (tokens, in) to y (tokens, width), in place: by the fixed pass if this is
        captured as a graph, or runs between its parts, and otherwise by the plan.

        Raises:
            EngineError: The layer does not get the tokens of the pass.
        """
        graph = _running_graph()
        if graph is None and self._plan is not None:
            super().add(layer, y, x)
        elif graph is None:  # vLLM warms up: this compiles the kernels that are captured next
            if len(x) in self._fixed:
                self.backend.apply(layer, y, x, self._fixed[len(x)])
        elif graph.has_lora:
            if len(x) != graph.num_tokens:
                raise EngineError(
                    f"{layer.name} gets {len(x)} rows in a pass of {graph.num_tokens} tokens, which CUDA graphs do not "
                    'support; leave out "cuda_graphs"'
                )
            self.backend.apply(layer, y, x, self._fixed_pass(graph.num_tokens))

    @property
    def _fits_graphs(self) -> bool:
        return self.backend.layout == self._layout and self._embedded is None

    def _fixed_pass(self, tokens: int) -> TritonPass:
        if tokens not in self._fixed:
            raise EngineError(
                f"vLLM runs a CUDA graph of {tokens} tokens, which is none of the sizes {[*self._fixed]} that it had "
                'at first; leave out "cuda_graphs"'
            )
        return self._fixed[tokens]


def _running_graph() -> BatchDescriptor | None:
    """Return what describes the graph as which the model runs or is captured; None if it runs without one."""
    context = get_forward_context()
    return None if context.cudagraph_runtime_mode == CUDAGraphMode.NONE else context.batch_descriptor
