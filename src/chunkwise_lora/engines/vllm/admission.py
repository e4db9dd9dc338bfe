"""Starts requests in vLLM's scheduler within the budget for adapters, and tells the workers what to hold.

The scheduler decides, because it also decides which KV blocks a request may use: a request that gets fewer rungs than
its plan would use must not share blocks with others. The decisions travel with the scheduler's output of a step, so the
workers carry them out before that step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.engines.vllm import settings
from chunkwise_lora.engines.vllm.budget import AdapterBudget


@dataclass
class Decisions:
    """What the scheduler has decided for a step."""

    rungs: dict[int, int] = field(default_factory=dict)
    """The highest rung on the device, or `WHOLE` or `ABSENT`, of each adapter for which it changes before this step."""
    limits: dict[str, int] = field(default_factory=dict)
    """The highest rung, or `WHOLE`, of each request that has started."""

    @staticmethod
    def of(scheduler_output: Any) -> Decisions:
        """Return the decisions for a step; none if there is no budget."""
        return getattr(scheduler_output, KEY, None) or Decisions()


class Admission:
    """The budget of one scheduler, and what its workers have not been told yet."""

    def __init__(self, budget: AdapterBudget, max_loras: int) -> None:
        self.budget = budget
        self._max_loras = max_loras
        self._limits: dict[str, int] = {}
        self._one_waits = False
        """Whether a request waits for memory in this step. Later ones then do not start, so that it gets its turn."""

    def may_start(self, request: Any) -> bool:
        """Start a request, unless it has been started. Returns whether it need not wait."""
        ask = settings.ask_in(getattr(request.sampling_params, "extra_args", None))
        if ask is None or request.request_id in self.budget:
            return True
        if self._one_waits or len(self.budget.running | {ask.adapter}) > self._max_loras:
            return False
        rung = self.budget.start(request.request_id, ask)
        if rung is None:
            self._one_waits = True
            return False
        if rung < ask.highest:
            request.cache_salt = settings.limited_salt(request.cache_salt, rung)
            request.block_hashes.clear()
            request.update_block_hashes()
        self._limits[request.request_id] = self.budget.name_of(ask.adapter, rung)
        return True

    def decisions(self) -> Decisions:
        """Return what was decided since the last call, and begin a new step."""
        limits, self._limits, self._one_waits = self._limits, {}, False
        return Decisions(self.budget.changes(), limits)


def _admission(scheduler: Any) -> Admission | None:
    """Return the scheduler's admission; None if there is no budget."""
    if not hasattr(scheduler, KEY):
        config = scheduler.vllm_config
        memory = config.lora_config and settings.of_server(config.additional_config).adapter_memory
        setattr(scheduler, KEY, Admission(AdapterBudget(memory), config.lora_config.max_loras) if memory else None)
    return getattr(scheduler, KEY)


def may_start(original: Callable[..., Any], scheduler: Any, request: Any) -> bool:
    """Return whether a waiting request may be scheduled in this step."""
    if not original(scheduler, request):
        return False
    admission = _admission(scheduler)
    return admission is None or admission.may_start(request)


def schedule(original: Callable[..., Any], scheduler: Any, *arguments: Any, **options: Any) -> Any:
    """Schedule a step. If there is a budget, the output also tells the workers what to hold."""
    admission = _admission(scheduler)
    if admission is None:
        return original(scheduler, *arguments, **options)
    admission.budget.end(scheduler.finished_req_ids)
    output = original(scheduler, *arguments, **options)
    setattr(output, KEY, admission.decisions())
    return output


def remove_lora(original: Callable[..., Any], core: Any, adapter: int) -> Any:
    """Unload an adapter because a user asks for it."""
    admission = _admission(core.scheduler)
    if admission is not None:
        admission.budget.end(core.scheduler.finished_req_ids)  # those that ended in the last step
        admission.budget.remove(adapter)
    return original(core, adapter)
