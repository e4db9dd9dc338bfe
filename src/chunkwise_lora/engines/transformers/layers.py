"""Replacements for the `forward` of modules. They ask the pass that runs in their thread what to do.

Outside of a pass, every replacement does what the module did before.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chunkwise_lora.backends import AnyBackend, Columns, Layer
from chunkwise_lora.engines.transformers.cache.stepping import StepRefused
from chunkwise_lora.engines.transformers.context import PASS, ForwardPass, adapter_between_passes, within
from chunkwise_lora.engines.transformers.rows import join_rows
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import PassPlan

BASE = "__base__"
"""The adapter name of sequences that run without an adapter, as in PEFT."""

ROUTED = "experts"
"""Part of the name of routed experts, which see the tokens of a pass in another order."""


MERGED = "adapters are merged into the model's weights; call unmerge_adapter() first"


class Asked(NamedTuple):
    """What PEFT would run in one of its layers, by the state that the user set."""

    known: frozenset[str]
    """The adapters that the layer has."""
    active: frozenset[str]
    """Those that run."""
    disabled: bool
    merged: bool


class PeftLayer:
    """A module that PEFT runs by its own state, such as DoRA, LoRA on an embedding or a replaced module.

    In a pass, PEFT's forward runs once per adapter, with that adapter active, and each sequence gets its adapter's
    output. The active adapter is state of the module, so threads take turns.

    Args:
        owner: Stands for the model in its passes.
        module: A layer or wrapper of PEFT.
        turn: Held while PEFT's state differs from what the user set.
    """

    def __init__(self, owner: object, module: nn.Module, turn: RLock) -> None:
        self.module = module
        self._owner = owner
        self._turn = turn
        self._forward: Callable[..., Any] = module.forward

    def asked(self) -> Asked:
        """Return what PEFT would run now, by the state that the user set."""
        state: Any = self.module
        with self._turn:
            known = frozenset(state._get_available_adapters())
            active = frozenset() if state.disable_adapters else known.intersection(state.active_adapters)
            return Asked(known, active, bool(state.disable_adapters), bool(getattr(state, "merged", False)))

    def refuse_merged(self) -> None:
        """Raise `EngineError` if an adapter is merged into the module's weight."""
        if getattr(self.module, "merged_adapters", ()):
            raise EngineError(MERGED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module, with every sequence's adapter."""
        running = PASS.get()
        if running is None or running.owner is not self._owner:
            name = adapter_between_passes(self._owner)
            if name is not None:
                return self.with_adapter(name, *args, **kwargs)
            with self._turn:
                return self._forward(*args, **kwargs)
        return self.in_pass(running, *args, **kwargs)

    def in_pass(self, running: ForwardPass, *args: Any, **kwargs: Any) -> Any:
        """Return the output in a pass."""
        if len(running.members) == 1:
            return self.with_adapter(*running.members, *args, **kwargs)
        outputs = []
        for name in running.members:
            with within(PASS, running.only(name)):  # PEFT's modules may lie in one another
                outputs.append(self.with_adapter(name, *args, **kwargs))
        return join_rows(outputs, [*running.members.values()], running.batch)

    def with_adapter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return the output with the adapter `name` for all sequences; `BASE` means none."""
        state: Any = self.module
        self.refuse_merged()
        with self._turn:
            before = state._active_adapter, state._disable_adapters
            # Adapters that do not change this module leave it to the base.
            state._active_adapter, state._disable_adapters = [name], name not in state._get_available_adapters()
            try:
                return self._forward(*args, **kwargs)
            finally:
                state._active_adapter, state._disable_adapters = before


class GatedLayer:
    """Runs a LoRA layer of PEFT by the plan of the pass.

    The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`.

    Args:
        owner: Stands for the model in its passes.
        name: Name of the module in the base model.
        peft: Runs the layer as PEFT does.
        base: Computes W x.
        sees_tokens: Whether the module sees the tokens of a pass, as a vision tower does not.
    """

    def __init__(
        self, owner: object, name: str, peft: PeftLayer, base: Callable[..., Tensor], sees_tokens: bool = True
    ) -> None:
        self.name = name
        self.base = base
        self.keys: set[str] = set()
        """Keys of the adapters that the backend has for this module."""
        self.lost_keys: set[str] = set()
        """Keys of those that another backend had, before the model was cast or moved."""
        self.run_by_peft: frozenset[str] = frozenset()
        """Names of adapters that are more than plain LoRA in this module, so that PEFT runs them."""
        self.peft = peft
        self._owner = owner
        self.sees_tokens_in_order = sees_tokens and ROUTED not in name.split(".")
        """Whether the module sees the tokens of a pass in their order. If not, it runs at full rank."""
        self._layer: Layer
        self._backend: AnyBackend | None = None

    def use(self, backend: AnyBackend, shape: tuple[int, int]) -> None:
        """Run adapters by `backend` from now on. `shape` is (out, in) of the module."""
        if backend is not self._backend:
            self._layer = backend.add_layer(self.name, shape[1], [Columns(0, shape[0])])
            self._backend = backend
            self.lost_keys |= self.keys
            self.keys = set()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in), adapter product included."""
        running = PASS.get()
        if running is None or running.owner is not self._owner:
            y: Tensor = self.peft(x, *args, **kwargs)
            return y
        running.layers += 1
        if self.run_by_peft and not self.run_by_peft.isdisjoint(running.members):
            return self._with_peft(running, x, *args, **kwargs)
        return self._gated(running, x, *args, **kwargs)

    def _gated(self, running: ForwardPass, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.peft.refuse_merged()
        y = self.base(x, *args, **kwargs)
        plan, backend = running.plan, self._backend
        if x.requires_grad and torch.is_grad_enabled() and not running.is_constant_per_sequence:
            raise EngineError(
                "gradients are recorded through a pass whose ranks depend on the tokens; use torch.no_grad(), the "
                "lossless preset, or detach()"
            )
        if self.lost_keys and not self.lost_keys.isdisjoint(plan.adapters):
            raise EngineError("the model was cast or moved since this call began; begin again with a new cache")
        tokens = x.numel() // x.shape[-1]
        if running.fixed is not None and backend is not None:
            if tokens != plan.tokens:
                raise StepRefused(f"{self.name} sees {tokens} tokens of {plan.tokens}")
            return backend.apply(self._layer, y, x, running.fixed)
        if backend is None or self.keys.isdisjoint(plan.adapters):
            return y
        if tokens != plan.tokens or not self.sees_tokens_in_order:
            plan = self._view(running, x, tokens)
        return backend.apply(self._layer, y, x, running.prepared(backend, plan))

    def _with_peft(self, running: ForwardPass, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Let PEFT run its adapters and the backend the others, and join their rows."""
        by_peft = {name: rows for name, rows in running.members.items() if name in self.run_by_peft}
        outputs = [self.peft.with_adapter(name, x, *args, **kwargs) for name in by_peft]
        rows: list[Tensor | None] = [*by_peft.values()]
        others = [members for name, members in running.members.items() if name not in self.run_by_peft]
        if others:
            outputs += [self._gated(running, x, *args, **kwargs)] * len(others)
            rows += others
        joined: Tensor = outputs[0] if len(outputs) == 1 else join_rows(outputs, rows, running.batch)
        return joined

    def _view(self, running: ForwardPass, x: Tensor, tokens: int) -> PassPlan:
        """Return the plan of a module that sees other tokens than those of the pass, or another order.

        Raises:
            EngineError: The tokens are unknown, and they have different adapters or gates.
        """
        plan = running.plan
        if running.is_constant and plan.is_uniform:
            return plan.with_tokens(tokens)
        columns, rest = divmod(tokens, plan.batch)
        if not self.sees_tokens_in_order:
            view = running.at_full_rank(tokens)
        elif rest or x.ndim < 3:
            view = None
        else:
            view = plan.tail(columns) if columns < plan.width else running.per_sequence(columns)
        if view is None:
            raise EngineError(
                f"{self.name}: sees {tokens} tokens of a pass of {plan.batch} x {plan.width} (a routed expert? a part "
                "of an image? a projection of cached tokens?), so it cannot give each token its own adapter and gates; "
                "run one adapter per batch, with the lossless preset"
            )
        return view
