"""Planning in vLLM's model runner: what it schedules goes to the planner, what is planned goes to the layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from chunkwise_lora.engines.vllm import loading, metrics, settings
from chunkwise_lora.engines.vllm.manager import LadderWorkerManager
from chunkwise_lora.engines.vllm.planner import Planner, Scheduled
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig


def load_ladder_model(runner: Any, model: Any, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
    """In place of vLLM's `load_lora_model`: prepare a runner's model for ladders, and plan its passes from now on."""
    runner.lora_manager = LadderWorkerManager(vllm_config, device, model.embedding_modules)
    model = runner.lora_manager.create_lora_manager(model, vllm_config)
    runner.chunkwise = RunnerPlanner(runner, runner.lora_manager, vllm_config)
    return model


class RunnerPlanner:
    """Follows one model runner through the three of its methods between which a request lives.

    `_update_states` tells which requests have ended, `set_active_loras` that a pass is ready to be planned, and
    `sample_tokens` has its logits.
    """

    def __init__(self, runner: Any, manager: LadderWorkerManager, vllm_config: VllmConfig) -> None:
        self.planner = Planner(vllm_config.model_config.get_vocab_size())
        self._runner = runner
        self._manager = manager
        self._noted: set[tuple[str, KVCacheConfig]] = set()
        """Adapters and KV policies about which the log has said what is left undone."""
        self._recorder: metrics.Recorder | None = None
        folder = os.environ.get(metrics.FOLDER, "")
        if os.path.isdir(folder) and get_tensor_model_parallel_rank() == 0:
            self._recorder = metrics.Recorder(folder)
            self.planner.tally = self._recorder.tally
        for name, hook in (
            ("_update_states", self._update_states),
            ("set_active_loras", self._set_active_loras),
            ("sample_tokens", self._sample_tokens),
        ):
            setattr(runner, name, _around(getattr(runner, name), hook))

    def _update_states(self, original: Callable[..., Any], scheduler_output: Any) -> Any:
        if scheduler_output.finished_req_ids:
            self.planner.forget(scheduler_output.finished_req_ids)
            self._count()
        return original(scheduler_output)

    def _set_active_loras(
        self, original: Callable[..., Any], input_batch: Any, num_scheduled_tokens: Any, *rest: Any, **options: Any
    ) -> None:
        original(input_batch, num_scheduled_tokens, *rest, **options)
        starts = input_batch.num_computed_tokens_cpu.tolist()
        counts = num_scheduled_tokens.tolist()
        scheduled = [Scheduled(*of) for of in zip(input_batch.req_ids, starts, counts, strict=False)]
        for one in scheduled:
            self._open(one.request)
        tokens = sum(counts)
        self._ends = [one.start + one.count for one in scheduled]
        parts = self.planner.plan(scheduled, self._runner.input_ids.gpu[:tokens].tolist)
        self._manager.ladders.additions.plan(parts)

    def _sample_tokens(self, original: Callable[..., Any], *arguments: Any) -> Any:
        state = self._runner.execute_model_state
        if state is not None and state.logits is not None:
            self.planner.sampled(self._runner.input_batch.req_ids, self._ends, state.logits)
        return original(*arguments)

    def _open(self, request_id: str) -> None:
        request = self._runner.requests[request_id]
        if request.lora_request is None:
            return
        ladder = self._manager.loaded(request.lora_request.lora_int_id)
        if self.planner.follows(request_id, ladder.plan):
            return
        config = settings.carried(getattr(request.sampling_params, "extra_args", None)) or ladder.config
        if config.complexity.learned and ladder.plan.learned is None:  # written after the ladder was loaded
            config = ChunkWiseConfig.preset("lossless")
        if (undone := (ladder.plan.name, config.kv_cache)) not in self._noted:
            self._noted.add(undone)
            loading.note_kv_policy(*undone)
        self.planner.open(
            request_id, str(ladder.id), ladder.plan, config, request.prompt_token_ids, request.output_token_ids
        )
        self._count()
        if self._recorder is not None:
            self._recorder.adapter_bytes(ladder.plan.name, ladder.nbytes)

    def _count(self) -> None:
        if self._recorder is not None:
            self._recorder.schedulers(len(self.planner))


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: hook(original, *arguments, **options)
