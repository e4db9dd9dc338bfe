"""Planning in vLLM's model runner: the planner gets what the runner schedules, and the layers get the plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from chunkwise_lora.engines.base import entropies_of
from chunkwise_lora.engines.vllm import loading, metrics, settings
from chunkwise_lora.engines.vllm.admission import Decisions
from chunkwise_lora.engines.vllm.graphs import GraphPass
from chunkwise_lora.engines.vllm.manager import LadderWorkerManager
from chunkwise_lora.engines.vllm.reports import SAYS, PassReport
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.sequence import SequencePlanner

NO_PROMPT_LOGPROBS = "prompt_logprobs cannot be computed with an adapter of the output head; leave them out"


def load_ladder_model(runner: Any, model: Any, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
    """Prepare a runner's model for ladders, and plan its passes from then on. It replaces vLLM's `load_lora_model`."""
    runner.lora_manager = LadderWorkerManager(vllm_config, device, model.embedding_modules)
    model = runner.lora_manager.create_lora_manager(model, vllm_config)
    runner.chunkwise = RunnerPlanner(runner, runner.lora_manager, vllm_config)
    return model


class RunnerPlanner:
    """Plans the passes of one model runner. It wraps methods of the runner.

    `_update_states` tells which requests have ended. `set_active_loras` is called when the requests of a pass are
    known. `sample_tokens` has the logits of the pass. It returns the output of the pass; where nothing is sampled,
    `execute_model` does. `_get_prompt_logprobs_dict` computes logits of other tokens than those to be sampled.
    With CUDA graphs, `_determine_batch_execution_and_padding` chooses one or none, and `_model_forward` replays it.
    """

    def __init__(self, runner: Any, manager: LadderWorkerManager, vllm_config: VllmConfig) -> None:
        self.planner = BatchPlanner(vllm_config.model_config.get_vocab_size())
        self._runner = runner
        self._manager = manager
        self._cache_dtype = vllm_config.cache_config.cache_dtype
        self._noted: set[tuple[str, KVCacheConfig]] = set()
        """Adapters and KV policies for which the log already names what is not carried out."""
        self._ends: list[int] = []
        """The position after the last token of each request in the running pass."""
        self._sampled: list[tuple[list[tuple[str, int]], Tensor]] = []
        """Entropies that have not been read yet, with the request and position of each."""
        self._report = PassReport()
        """What the scheduler will be told about the running pass."""
        self._limits: dict[str, int] = {}
        """The highest rung of each request, if there is a budget for adapters."""
        self._recorder: metrics.Recorder | None = None
        folder = os.environ.get(metrics.FOLDER, "")
        if os.path.isdir(folder) and get_tensor_model_parallel_rank() == 0:
            self._recorder = metrics.Recorder(folder)
            self.planner.record = self._recorder.record
            manager.ladders.on_load = self._recorder.loaded
            manager.ladders.on_unload = self._recorder.unloaded
            manager.on_remove = self._recorder.removed
        hooks: dict[str, Callable[..., Any]] = {
            "_update_states": self._update_states,
            "set_active_loras": self._set_active_loras,
            "execute_model": self._execute_model,
            "_get_prompt_logprobs_dict": self._get_prompt_logprobs,
            "sample_tokens": self._sample_tokens,
        }
        running = manager.ladders.running
        if isinstance(running, GraphPass):
            hooks |= {"_determine_batch_execution_and_padding": running.choose, "_model_forward": running.forward}
        for name, hook in hooks.items():
            setattr(runner, name, _around(getattr(runner, name), hook))

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that vLLM's cache cannot carry out."""
        return loading.kv_left_undone(config, self._cache_dtype)

    def _update_states(self, original: Callable[..., Any], scheduler_output: Any) -> Any:
        if scheduler_output.finished_req_ids:
            self.planner.close(scheduler_output.finished_req_ids)
            for request in scheduler_output.finished_req_ids:
                self._limits.pop(request, None)
            self._count()
        decisions = Decisions.of(scheduler_output)
        self._limits |= decisions.limits
        self._manager.hold(decisions.rungs)
        adapters = (request.lora_request for request in scheduler_output.scheduled_new_reqs)
        self._manager.reload = {one.lora_int_id for one in adapters if one is not None and one.load_inplace}
        return original(scheduler_output)

    def _set_active_loras(
        self, original: Callable[..., Any], input_batch: Any, num_scheduled_tokens: Any, *rest: Any, **options: Any
    ) -> None:
        original(input_batch, num_scheduled_tokens, *rest, **options)
        starts = input_batch.num_computed_tokens_cpu.tolist()
        counts = num_scheduled_tokens.tolist()
        spans = []
        for request, start, count in zip(input_batch.req_ids, starts, counts, strict=False):
            self._open(request)
            spans.append(Span(request, start, count))
        self._ends = [span.start + span.count for span in spans]
        self._learn()
        plan = self.planner.plan(spans, lambda: self._token_ids(counts))
        running = self._manager.ladders.running
        running.plan(plan, np.cumsum(counts) - 1)
        running.samples = True
        self._report.ranks = {
            request: {"mean_rank": planner.mean_rank, "full_rank": planner.full_rank}
            | ({"available_rank": planner.available_rank} if request in self._limits else {})
            for request in input_batch.req_ids
            if (planner := self.planner.get(request)) is not None
        }

    def _token_ids(self, counts: Sequence[int]) -> list[list[int]]:
        """Return the token ids of the running pass, by request. This waits for the device."""
        ids = self._runner.input_ids.gpu[: sum(counts)].tolist()
        ends = list(accumulate(counts))
        return [ids[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _sample_tokens(self, original: Callable[..., Any], *arguments: Any) -> Any:
        state = self._runner.execute_model_state
        if state is not None and state.logits is not None:
            self._note_entropies(self._runner.input_batch.req_ids, state.logits)
        return self._reported(original(*arguments))

    def _execute_model(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._reported(original(*arguments, **options))

    def _reported(self, output: Any) -> Any:
        """Add the report of the running pass to its output, when there is one."""
        if output is not None and (self._report.failed or self._report.ranks):
            self._report.add_to(output)
            self._report = PassReport()
        return output

    def _get_prompt_logprobs(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        running = self._manager.ladders.running
        running.samples = False
        try:
            return original(*arguments, **options)
        finally:
            running.samples = True

    def _note_entropies(self, requests: Sequence[str], logits: Tensor) -> None:
        """Compute the entropies of logits (requests, vocabulary), which predict each request's next token."""
        planners = [self.planner.get(request) for request in requests]
        rows = [row for row, planner in enumerate(planners) if planner is not None and planner.config.reads_entropy]
        if rows:
            # The entropies are read when the next pass is planned, so that this pass does not wait for the device.
            chosen = logits if len(rows) == len(logits) else logits[rows]
            self._sampled.append(([(requests[row], self._ends[row]) for row in rows], entropies_of(chosen)))

    def _learn(self) -> None:
        """Give the planner the entropies of the previous passes."""
        for positions, entropies in self._sampled:
            for (request, position), entropy in zip(positions, entropies.tolist(), strict=True):
                if (planner := self.planner.get(request)) is not None:
                    planner.learn(position, entropy)
        self._sampled.clear()

    def _open(self, request_id: str) -> None:
        request = self._runner.requests[request_id]
        if request.lora_request is None:
            return
        adapter = request.lora_request.lora_int_id
        if adapter in self._manager.failed:
            self._report.failed[request_id] = self._manager.failed[adapter]
            self.planner.close([request_id])
            return
        ladder = self._manager.loaded(adapter)
        if getattr(request.sampling_params, "prompt_logprobs", None) is not None and self._manager.ladders.adapts_head(
            ladder.info.key
        ):
            self._report.failed[request_id] = SAYS + NO_PROMPT_LOGPROBS
            return
        known = self.planner.get(request_id)
        if known is not None and known.adapter.has_rungs_of(ladder.info):
            return
        config = settings.config_in(getattr(request.sampling_params, "extra_args", None)) or ladder.config
        if config.complexity.learned and ladder.info.learned is None:  # the folder was calibrated after it was loaded
            config = ChunkWiseConfig.preset("lossless")
        if (noted := (ladder.info.name, config.kv_cache)) not in self._noted:
            self._noted.add(noted)
            loading.note_kv_policy(*noted, self._cache_dtype)
        prompt, output = request.prompt_token_ids, request.output_token_ids
        planner = SequencePlanner(
            ladder.info,
            config,
            self.planner.vocab_size,
            [*prompt, *output],
            len(prompt),
            self._limits.get(request_id),
        )
        self.planner.open(request_id, planner)
        self._count()

    def _count(self) -> None:
        if self._recorder is not None:
            self._recorder.schedulers(len(self.planner))


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: hook(original, *arguments, **options)
