"""A call of a model: a generation, or a plain forward pass. It lives in a context variable while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from chunkwise_lora.engines.transformers.session import Session, SessionCache
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.fixed_scheduler import FixedScheduler
from chunkwise_lora.method.trace import Trace


@dataclass(eq=False)
class Call:
    """A running call."""

    owner: object
    """The model, as the object that stands for it in this engine."""
    session: Session
    cache: SessionCache | None
    """The engine's cache; None if the model keeps another kind of cache, or none."""
    takes_cache_as: str | None
    """The name of the model's parameter for its cache; None if it has none."""
    thread: int = field(default_factory=get_ident)
    """The thread that runs it. Other threads may have copied its context."""
    has_ended: bool = False

    @property
    def planner(self) -> BatchPlanner:
        """The planner of the sequences."""
        return self.session.planner

    def follow(self, schedulers: Sequence[FixedScheduler]) -> None:
        """Take these plans, one per sequence, instead of planning. Call this before the first pass."""
        self.session.follow(schedulers)

    def trace(self) -> Trace:
        """Return what happened so far."""
        return self.session.trace(self.cache)

    def owns(self, inputs: dict[str, Any]) -> bool:
        """Return whether a forward pass belongs to this call. Others run beside it, from a stopping criterion for
        example."""
        if self.takes_cache_as is None:
            return True
        cache, tokens, mask = (inputs.get(name) for name in (self.takes_cache_as, "input_ids", "attention_mask"))
        if isinstance(cache, SessionCache):
            return cache is self.cache
        if self.cache is not None and self.session.columns:
            # A wider mask shows that the pass goes on, but that the model has dropped its cache.
            return cache is None and tokens is not None and mask is not None and mask.shape[-1] > tokens.shape[1]
        return cache is not None or not self.session.columns or self.session.begins(tokens)

    def is_restarted_by(self, inputs: dict[str, Any]) -> bool:
        """Return whether a pass of `generate` runs all tokens again without the cache, as some models do when a text
        passes their original length."""
        cache = inputs.get(self.takes_cache_as) if self.takes_cache_as is not None else None
        by_generate = inputs.get("use_cache") is True and inputs.get("position_ids") is not None
        if self.cache is None or not self.session.columns or cache is not None or not by_generate:
            return False
        return self.session.begins(inputs.get("input_ids"))

    def restart(self, use_kernels: bool) -> None:
        """Begin again, with all tokens so far as prompts and an empty cache."""
        self.session = self.session.anew()
        self.cache = self.session.new_cache(use_kernels)


CALL: ContextVar[Call | None] = ContextVar("chunkwise_call", default=None)


def running_call(owner: object) -> Call | None:
    """Return the innermost call of `owner` that runs in this thread."""
    call = CALL.get()
    runs_here = call is not None and call.owner is owner and call.thread == get_ident() and not call.has_ended
    return call if runs_here else None
