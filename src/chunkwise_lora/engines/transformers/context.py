"""What a call and its forward passes know. It lives in context variables, so that threads do not share it.

A new thread starts without the context of the thread that started it. Outside of a pass, PEFT's own forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from chunkwise_lora.backends import AnyBackend
from chunkwise_lora.backends.emulation import Widened
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.segments import PassPlan, Segment


@dataclass(frozen=True)
class Request:
    """What a caller asks of a model."""

    owner: object
    """The model, as the object that stands for it in this engine."""
    adapter_names: str | Sequence[str] | None = None
    config: ChunkWiseConfig | None = None


@dataclass(eq=False)
class ForwardPass:
    """A forward pass that runs."""

    owner: object
    """The model, as the object that stands for it in this engine."""
    plan: PassPlan
    members: Mapping[str, Tensor | None]
    """By adapter name, the sequences of the batch (n,) that use it; None for all of them."""
    full_rungs: Mapping[str, int]
    """By adapter key, its highest rung."""
    is_constant: bool
    """Whether every token of the whole generation gets the same gates of one adapter."""
    is_constant_per_sequence: bool
    """Whether every token of a sequence gets the same gates."""
    batch: int
    fixed: Any = None
    """The pass of a backend that runs all layers alike, whatever the plan, so that a CUDA graph may capture it."""
    widened: Widened = field(default_factory=Widened)
    """The input of the current layer in float32."""
    layers: int = 0
    """How many adapted layers have run."""
    _prepared: dict[tuple[int, int], tuple[PassPlan, Any]] = field(default_factory=dict, repr=False)
    _full: dict[int, PassPlan] = field(default_factory=dict, repr=False)

    def prepared(self, backend: AnyBackend, plan: PassPlan) -> Any:
        """Return `plan`, which is the pass's plan or a layer's view of it, as `backend` prepared it."""
        key = id(backend), id(plan)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = plan, backend.prepare(plan)  # the plan is kept, so that its id stays unique
        return found[1]

    def only(self, name: str) -> ForwardPass:
        """Return the same pass as if all sequences used the adapter `name`, for modules that PEFT runs."""
        return replace(self, members={name: None})

    def per_sequence(self, columns: int) -> PassPlan | None:
        """Return the plan of a layer that sees `columns` tokens of each sequence, such as all tokens so far.

        None if the tokens of a sequence have different gates.
        """
        return self.plan.repeated(columns) if self.is_constant_per_sequence else None

    def at_full_rank(self, tokens: int) -> PassPlan | None:
        """Return a plan at full rank for `tokens` tokens in any order; None if several adapters run in the pass."""
        if len(self.members) > 1:
            return None
        if tokens not in self._full:
            segments = tuple(Segment(key, rung) for key, rung in self.full_rungs.items())
            self._full[tokens] = PassPlan(segments, 1, tokens)
        return self._full[tokens]


REQUEST: ContextVar[Request | None] = ContextVar("chunkwise_request", default=None)
PASS: ContextVar[ForwardPass | None] = ContextVar("chunkwise_pass", default=None)

BETWEEN: ContextVar[tuple[object, frozenset[str]] | None] = ContextVar("chunkwise_between_passes", default=None)
"""The model and the adapter names of the running generation, for modules that it runs between its passes: transformers
may encode images before the first pass."""


@contextmanager
def within(variable: ContextVar[Any], value: object) -> Iterator[None]:
    """Set a context variable, and give it its former value back in the end, whatever ends the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        with suppress(ValueError):  # a generator that the user has left may be closed in another thread
            variable.reset(token)


def adapter_between_passes(owner: object) -> str | None:
    """Return the adapter of the generation of `owner` that runs in this thread; None if there is none.

    Raises:
        EngineError: The generation has several adapters.
    """
    between = BETWEEN.get()
    if between is None or between[0] is not owner:
        return None
    if len(between[1]) > 1:
        raise EngineError(
            "the model runs an adapted module between its passes, for a whole batch with the adapters "
            f"{', '.join(sorted(between[1]))}; run one adapter per batch"
        )
    return next(iter(between[1]))


def request_of(owner: object) -> Request:
    """Return what the caller asks of `owner`; an empty request if nothing."""
    request = REQUEST.get()
    return request if request is not None and request.owner is owner else Request(owner)
