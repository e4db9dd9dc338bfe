"""The state of the forward pass that is running: its plan, and the plan as each backend prepared it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chunkwise_lora.backends import AnyBackend
from chunkwise_lora.backends.emulation import Widened
from chunkwise_lora.method.segments import PassPlan


class ForwardContext:
    """The state that all adapted layers share during a pass. It is empty between passes."""

    def __init__(self) -> None:
        self.plan: PassPlan | None = None
        """The plan of the pass. None: no adapter runs."""
        self.is_constant = False
        """Whether every token of the whole generation gets the same gates of one adapter."""
        self.sequences: dict[str, Tensor | None] = {}
        """By adapter key, the sequences of the batch (n,) that use it; None for all of them."""
        self.widened = Widened()
        """The input of the current layer in float32."""
        self._prepared: dict[tuple[int, int], Any] = {}

    def begin(self, plan: PassPlan, sequences: dict[str, Tensor | None], is_constant: bool) -> None:
        """Start a pass. The arguments are described at the attributes."""
        self.clear()
        self.plan, self.sequences, self.is_constant = plan, sequences, is_constant

    def clear(self) -> None:
        """End the pass and release its tensors."""
        self.plan, self.sequences, self.widened = None, {}, Widened()
        self._prepared.clear()

    def prepared(self, backend: AnyBackend, plan: PassPlan) -> Any:
        """Return `plan`, which is the pass's plan or a layer's view of it, as `backend` prepared it."""
        key = id(backend), id(plan)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = backend.prepare(plan)
        return found
