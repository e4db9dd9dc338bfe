"""Replacements for the `forward` of the modules that adapters change."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from chunkwise_lora.backends import AnyBackend, Layer
from chunkwise_lora.engines.transformers.context import ForwardContext
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.wide_linear import WideLinear, widens
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import PassPlan

ROUTED = "experts"
"""Part of the name of routed experts, which see the tokens of a pass in another order."""


class GatedLinear:
    """Replaces the `forward` of any kind of linear module, and adds the adapter product of the pass.

    The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`.
    """

    def __init__(self, name: str, module: nn.Module, context: ForwardContext, fast: FastPaths) -> None:
        self.name = name
        self.inner: Callable[[Tensor], Tensor] = module.forward
        """Computes W x: the module's own forward, a `WideLinear` or a `ReplacedModule`."""
        self.adapters: set[str] = set()
        """Keys of the adapters that change this module."""
        self._context = context
        self._is_routed = ROUTED in name.split(".")
        self.layer: Layer | None = None
        """The backend's record of this module; None if no adapter changes it."""
        self._backend: AnyBackend
        if fast.products and widens(module):
            self.inner = WideLinear(module, context, fast.kernels)

    def set_backend(self, backend: AnyBackend, layer: Layer) -> None:
        """Run adapters by `backend`. `layer` is its record of this module."""
        self._backend, self.layer = backend, layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in), adapter product included."""
        y = self.inner(x)
        plan = self._context.plan
        if plan is None or self.adapters.isdisjoint(plan.adapters):
            return y
        tokens = x.numel() // x.shape[-1]
        if tokens != plan.tokens or self._is_routed:
            plan = self._view(x, tokens, plan)
        return self._backend.apply(self.layer, y, x, self._context.prepared(self._backend, plan))

    def _view(self, x: Tensor, tokens: int, plan: PassPlan) -> PassPlan:
        """Return the plan of a module that sees other tokens than those of the pass, or another order.

        Raises:
            EngineError: The tokens are unknown, and they have different gates.
        """
        if self._context.is_constant and plan.is_uniform:
            return plan.with_tokens(tokens)
        columns, rest = divmod(tokens, plan.batch)
        if rest or columns >= plan.width or x.ndim < 3 or self._is_routed:
            raise EngineError(
                f"{self.name}: sees {tokens} tokens of a pass of {plan.batch} x {plan.width} (a routed expert? a "
                "projection of cached tokens?), so it cannot give each token its own gates; use the lossless preset "
                "with one adapter per batch"
            )
        return plan.tail(columns)


class ReplacedModule:
    """Replaces the `forward` of a module that adapters replace (PEFT's `modules_to_save`)."""

    def __init__(self, module: nn.Module, context: ForwardContext) -> None:
        self.copies: dict[str, nn.Module] = {}
        """Copies of the module by adapter key."""
        self._forward: Callable[..., Tensor] = module.forward
        self._context = context

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output for x (batch, ...), where each sequence runs through its adapter's copy of the module."""
        y = None
        for adapter, sequences in self._context.sequences.items():
            copy = self.copies.get(adapter)
            if copy is None:
                continue
            if sequences is None:
                return copy(x)
            y = self._forward(x).clone() if y is None else y
            rows = sequences.to(x.device)
            y[rows] = copy(x[rows])
        return self._forward(x) if y is None else y
