"""What a worker reports about the requests of a pass, on its way to the users: which have failed, and at what mean rank
the others ran.

In vLLM an error in a worker ends the engine for all users. Here, if an adapter cannot be loaded, the worker runs the
pass without it and reports its requests as failed. The scheduler ends these requests and drops their KV. A client of
the API server gets an error; `LLM.generate` returns an output whose `finish_reason` is "error" and whose `stop_reason`
is the message.

The mean rank travels in `kv_transfer_params`, the one dictionary that vLLM passes on from the scheduler to the
response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.errors import shown

SAYS = "ChunkWise LoRA: "
"""Begins every message about an adapter that a worker could not load."""

LONGEST = 1000
"""Bound on the characters of a message. A message may quote values that came with a request or from a file."""


class RefusedRequest(VLLMValidationError, ValueError):
    """A request that cannot work. vLLM answers it with HTTP 400; in Python it is also a `ValueError`."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message, LONGEST))


@dataclass
class PassReport:
    """A worker's report about the requests of one pass, by their ids."""

    failed: dict[str, str] = field(default_factory=dict)
    """The message for each request whose adapter could not be loaded."""
    ranks: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each request with an adapter: the mean rank of its tokens so far (`mean_rank`), and the `full_rank`. If there
    is a budget for adapters, the rank of the highest rung that the request may use, too (`available_rank`)."""

    def add_to(self, runner_output: Any) -> None:
        """Add the report to the output of a runner's pass."""
        # With asynchronous scheduling, the output is inside an object that waits for the device.
        getattr(runner_output, "_model_runner_output", runner_output).chunkwise = self


def update_from_output(original: Callable[..., Any], scheduler: Any, scheduler_output: Any, runner_output: Any) -> Any:
    """Update the scheduler after a pass, as vLLM does. End the requests that have failed, and tell the mean ranks."""
    report: PassReport = getattr(runner_output, KEY, PassReport())
    requests = {key: scheduler.requests[key] for key in {*report.failed, *report.ranks} if key in scheduler.requests}
    failed = [requests[key] for key in report.failed if key in requests]
    _end(scheduler, failed)
    outputs = original(scheduler, scheduler_output, runner_output)
    for of_client in outputs.values():
        for output in of_client.outputs:
            ranks = report.ranks.get(output.request_id)
            if ranks is not None and (output.finish_reason is not None or _may_end_later(requests[output.request_id])):
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: ranks}
    for request in failed:
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            pooling_output=torch.empty(0) if request.pooling_params else None,
            finish_reason=FinishReason.ERROR,
            stop_reason=report.failed[request.request_id],
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
    return outputs


def _end(scheduler: Any, requests: Iterable[Any]) -> None:
    """End requests whose KV was computed without their adapter. No other request may find it."""
    blocks = scheduler.kv_cache_manager
    for request in requests:
        blocks.evict_blocks({block for group in blocks.get_block_ids(request.request_id) for block in group})
        scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)


def _may_end_later(request: Any) -> bool:
    """Return whether the front end may find that an output is the last one, by a stop string."""
    return bool(request.sampling_params and request.sampling_params.stop)


def make_request_output(
    original: Callable[..., Any],
    state: Any,
    tokens: Any,
    pooling_output: Any,
    finish_reason: Any,
    stop_reason: Any,
    *rest: Any,
    **options: Any,
) -> Any:
    """Make the output that a caller of vLLM gets. If the request has failed, a client of the server gets an error."""
    if finish_reason is FinishReason.ERROR and str(stop_reason).startswith(SAYS):
        error = RefusedRequest(stop_reason)
        if state.queue is not None:
            state.queue.put(error)
            return None
        if pooling_output is not None:  # such an output has no place for a message
            raise error
    return original(state, tokens, pooling_output, finish_reason, stop_reason, *rest, **options)


def completion_response(original: Callable[..., Any], serving: Any, outputs: Any, *rest: Any, **options: Any) -> Any:
    """Make the response to a completion request. Its usage also tells the mean rank over the tokens of all prompts."""
    response = original(serving, outputs, *rest, **options)
    ranks: list[Any] = [(output.kv_transfer_params or {}).get(KEY) for output in outputs]
    if len(ranks) > 1 and all(ranks):
        response.kv_transfer_params = {**(response.kv_transfer_params or {}), KEY: _mean(outputs, ranks)}
    return _with_ranks(response)


def _mean(outputs: Sequence[Any], ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean rank over the tokens of several prompts and their answers, and the least available rank."""
    tokens = [
        len(output.prompt_token_ids or ()) + sum(len(choice.token_ids) for choice in output.outputs)
        for output in outputs
    ]
    mean = sum(one["mean_rank"] * count for one, count in zip(ranks, tokens, strict=True)) / sum(tokens)
    return {name: min(one[name] for one in ranks) for name in ranks[0]} | {"mean_rank": mean}


async def chat_response(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Make the response to a chat request. Its usage also tells the mean rank."""
    return _with_ranks(await original(*arguments, **options))


def _with_ranks(response: Any) -> Any:
    """Move the mean rank from `kv_transfer_params` of a response to its usage."""
    ranks = (getattr(response, "kv_transfer_params", None) or {}).get(KEY)
    if ranks is not None and response.usage is not None:
        others = {name: value for name, value in response.kv_transfer_params.items() if name != KEY}
        response.kv_transfer_params = others or None
        setattr(response.usage, KEY, ranks)
    return response
