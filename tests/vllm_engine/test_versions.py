"""Every function and field of vLLM that the plug-in uses exists in the versions that it supports.

This reads vLLM's source and imports nothing, so it can check a version that is not installed: CHUNKWISE_VLLM_SOURCES
names folders that hold the package `vllm` of other versions (`make test-vllm-sources` downloads them).
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest
import vllm

from chunkwise_lora.engines.vllm import plugin, versions
from conftest import OPTIONS

INSTALLED = Path(find_spec("vllm").submodule_search_locations[0]).parent  # type: ignore[union-attr, index]
SOURCES = [INSTALLED, *map(Path, filter(None, os.environ.get("CHUNKWISE_VLLM_SOURCES", "").split(":")))]

PLATFORM = versions.HOOKS["check_and_update_config"]
FIELDS = {
    "vllm.config:CacheConfig": ("cache_dtype",),
    "vllm.config:CompilationConfig": ("cudagraph_mode", "cudagraph_capture_sizes", "static_forward_context"),
    "vllm.config:LoRAConfig": (
        "max_loras",
        "max_cpu_loras",
        "max_lora_rank",
        "fully_sharded_loras",
        "enable_tower_connector_lora",
        "lora_dtype",
    ),
    "vllm.config:ModelConfig": ("dtype", "get_vocab_size", "runner_type"),
    "vllm.config:ParallelConfig": ("pipeline_parallel_size", "use_ubatching"),
    "vllm.config:SchedulerConfig": ("scheduler_cls",),
    "vllm.config:VllmConfig": (
        *("lora_config", "parallel_config", "model_config", "compilation_config", "speculative_config"),
        *("additional_config", "cache_config", "use_v2_model_runner", "scheduler_config"),
    ),
    "vllm.exceptions:LoRAAdapterNotFoundError": (),
    "vllm.exceptions:VLLMValidationError": (),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": (
        *("output_slices", "input_size", "tp_size", "slice_lora_a", "slice_lora_b", "set_mapping"),
    ),
    "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA": ("hidden_size", "vocab_size", "_get_logits"),
    "vllm.lora.layers:": ("VocabParallelEmbeddingWithLoRA",),
    "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA": ("base_layer", "forward"),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": ("embedding_dim", "org_vocab_size"),
    "vllm.lora.model_manager:LoRAModelManager": (
        *("model", "modules", "packed_modules", "supported_lora_modules", "lora_config", "device"),
        *("max_num_batched_tokens", "capacity", "lora_slots", "_registered_adapters", "_active_adapters"),
        *(
            "is_pooling_model",
            "_create_lora_modules",
            "_match_target_modules",
            "create_dummy_lora",
            "_add_adapter",
            "activate_adapter",
        ),
        *(
            "_deactivate_adapter",
            "deactivate_adapter",
            "remove_adapter",
            "remove_all_adapters",
            "set_adapter_mapping",
            "get_adapter",
        ),
    ),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager": ("add_adapter", "remove_oldest_adapter"),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path", "load_inplace"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager": (
        *("_manager_cls", "_adapter_manager", "lora_config", "create_lora_manager", "_load_adapter", "add_adapter"),
        *("_apply_adapters", "add_dummy_lora", "remove_adapter", "list_adapters", "pin_adapter"),
    ),
    "vllm.sampling_params:SamplingParams": ("extra_args",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ("evict_blocks", "get_block_ids"),
    "vllm.v1.core.sched.output:NewRequestData": ("lora_request",),
    "vllm.v1.core.sched.output:SchedulerOutput": ("finished_req_ids", "scheduled_new_reqs"),
    "vllm.v1.core.sched.scheduler:Scheduler": (
        *("requests", "kv_cache_manager", "finish_requests", "finished_req_ids", "vllm_config"),
    ),
    "vllm.v1.engine.core:EngineCore": ("scheduler",),
    "vllm.v1.engine:EngineCoreOutput": (
        *("request_id", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "events", "trace_headers"),
        "kv_transfer_params",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.engine:EngineCoreRequest": (
        *("lora_request", "sampling_params", "prompt_token_ids", "prompt_embeds", "cache_salt"),
    ),
    "vllm.v1.engine:FinishReason": ("ERROR",),
    "vllm.v1.engine.input_processor:InputProcessor": ("lora_config", "vllm_config"),
    "vllm.v1.engine.output_processor:RequestState": ("queue",),
    "vllm.v1.request:Request": (
        *("request_id", "client_index", "take_events", "trace_headers", "pooling_params"),
        *("cache_salt", "num_prompt_tokens", "sampling_params", "block_hashes", "update_block_hashes"),
    ),
    "vllm.v1.request:RequestStatus": ("FINISHED_ERROR",),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        *("lora_request", "sampling_params", "prompt_token_ids", "output_token_ids"),
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("req_ids", "num_computed_tokens_cpu"),
    "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput": ("_model_runner_output",),
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState": ("logits",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        *("_update_states", "set_active_loras", "execute_model", "sample_tokens", "_get_prompt_logprobs_dict"),
        *("execute_model_state", "requests", "input_batch", "input_ids"),
    ),
    "vllm.entrypoints.openai.completion.protocol:CompletionResponse": ("usage", "kv_transfer_params"),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionResponse": ("usage", "kv_transfer_params"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("engine_client", "lora_requests"),
    "vllm.entrypoints.openai.models.serving:": ("create_error_response",),
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": ("vllm_xargs",),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": ("vllm_xargs",),
    "vllm.distributed.parallel_state:GroupCoordinator": ("cpu_group", "world_size"),
    "vllm.lora.utils:": ("get_adapter_absolute_path", "parse_fine_tuned_lora_name", "replace_submodule"),
    "vllm.utils.torch_utils:": ("direct_register_custom_op",),
    "vllm.forward_context:BatchDescriptor": ("num_tokens", "has_lora"),
    "vllm.forward_context:ForwardContext": ("no_compile_layers", "cudagraph_runtime_mode", "batch_descriptor"),
}
"""Fields and functions of vLLM that the plug-in reads, calls or overrides, by module and class."""


class Source:
    """The source of one version of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = vllm.__version__ if folder == INSTALLED else folder.name

    @cache  # noqa: B019
    def module(self, name: str) -> ast.Module:
        """The parsed module; an empty one for modules of other packages."""
        if not name.startswith("vllm"):
            return ast.parse("")
        path = self.folder.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return ast.parse(file.read_text(encoding="utf-8"))

    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The class or function of a module, and the module that it was imported from."""
        for node in ast.walk(self.module(module)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return module, node
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
                return self.find(self._absolute(module, node), name)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        package = module if self.folder.joinpath(*module.split(".")).is_dir() else module.rpartition(".")[0]
        return resolve_name("." * node.level + (node.module or ""), package)

    def names(self, module: str, owner: str) -> set[str]:
        """The fields and methods of a class and its bases, or the functions and imports of a module."""
        if not owner:
            return set(_imported(self.module(module))) | set(_defined(self.module(module)))
        found = self.find(module, owner)
        if found is None:
            return set()
        module, node = found
        assert isinstance(node, ast.ClassDef)
        bases = (_name(base) for base in node.bases)
        return set(_defined(node)).union(*(self.names(module, base) for base in bases if base))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else _name(node.value) if isinstance(node, ast.Subscript) else ""


def _imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            yield from (one.asname or one.name for one in node.names)


def _defined(scope: ast.AST) -> Iterator[str]:
    """Names that a class or module defines: functions, fields, and attributes of `self`."""
    for node in ast.walk(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id
            elif isinstance(target, ast.Attribute) and _name(target.value) == "self":
                yield target.attr
            elif isinstance(target, ast.Tuple):
                yield from (one.attr for one in target.elts if isinstance(one, ast.Attribute))


@pytest.fixture(scope="module", params=SOURCES, ids=lambda folder: folder.name)
def source(request: pytest.FixtureRequest) -> Source:
    return Source(request.param)


@pytest.mark.parametrize("place", versions.HOOKS)
def test_each_function_that_is_wrapped_has_the_parameters_that_are_read(source: Source, place: str) -> None:
    hook = versions.HOOKS[place]
    module, owner = ("vllm.platforms.cpu", "CpuPlatform") if hook is PLATFORM else (hook.module, hook.owner)
    scope = source.find(module, owner) if owner else (module, source.module(module))
    assert scope is not None, f"{module} has no {owner}"
    functions = (node for node in ast.walk(scope[1]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    function = next((node for node in functions if node.name == hook.name), None)
    if function is None and not versions.is_at_least(hook.since, source.version):
        return
    if function is None and not owner:
        assert source.find(module, hook.name) is not None  # imported by name
        return
    assert function is not None, f"{module}.{owner} has no {hook.name}"
    parameters = tuple(one.arg for one in (*function.args.posonlyargs, *function.args.args))
    assert parameters[: len(hook.parameters)] == hook.parameters


@pytest.mark.parametrize("place", FIELDS)
def test_each_field_that_is_read_exists(source: Source, place: str) -> None:
    module, _, owner = place.partition(":")
    if owner:
        assert source.find(module, owner) is not None, f"{module} has no {owner}"
    assert not set(FIELDS[place]) - source.names(module, owner)


def test_each_hook_has_a_wrapper() -> None:
    assert plugin._wrappers().keys() == versions.HOOKS.keys()


def test_passes_with_plans_choose_a_graph_and_run_it_by_the_wrapped_methods(source: Source) -> None:
    _, runner = source.find("vllm.v1.worker.gpu_model_runner", "GPUModelRunner") or ("", None)
    assert isinstance(runner, ast.ClassDef)
    methods = {node.name: node for node in runner.body if isinstance(node, ast.FunctionDef)}

    def calls(method: str, called: str) -> list[ast.Call]:
        nodes = (node for node in ast.walk(methods[method]) if isinstance(node, ast.Call))
        return [node for node in nodes if isinstance(node.func, ast.Attribute) and node.func.attr == called]

    choose = "_determine_batch_execution_and_padding"
    arguments = methods[choose].args
    assert "force_eager" in {one.arg for one in (*arguments.args, *arguments.kwonlyargs)}
    for method in ("execute_model", "_dummy_run"):
        (call,) = calls(method, choose)
        assert not call.args, "options are given by name"
    assert len(calls("execute_model", "_model_forward")) == 1 and not calls("execute_model", "model")
    assert not calls("_dummy_run", "_model_forward") and len(calls("_dummy_run", "model")) == 1
    assert [call.lineno for call in calls("execute_model", "_prepare_inputs")] < [
        call.lineno for call in calls("execute_model", choose)
    ], "the plan is made first"
    assert calls("_prepare_inputs", "set_active_loras")


def test_heads_of_classifiers_can_be_replaced(source: Source) -> None:
    """Since 0.31. In 0.30, adapters of these heads are refused."""
    has_heads = "supported_modules_to_save" in source.names("vllm.lora.model_manager", "LoRAModelManager")
    assert has_heads == versions.is_at_least("0.31", source.version)
    if has_heads:
        assert "_pooling_task" in source.names("vllm.lora.model_manager", "LoRAModelManager")
        assert "replace_classifier" in source.names("vllm.model_executor.layers.pooler.special", "DispatchPooler")


@pytest.mark.parametrize(
    ("release", "is_known"),
    [("0.30.0", True), ("0.32.1+cpu", True), ("0.33.0", True), ("0.29.1", False), ("0.34.0", False), ("dev", False)],
)
def test_releases_of_tested_minor_versions_are_known(release: str, is_known: bool) -> None:
    assert versions.is_tested(release) is is_known


def test_vllm_takes_its_v1_runner_where_it_could_take_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**OPTIONS).create_engine_config()
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    assert not config.use_v2_model_runner
    monkeypatch.setattr(config, "lora_config", None)
    assert config.use_v2_model_runner


def test_the_v1_runner_is_there(source: Source) -> None:
    """vLLM has deprecated its V1 model runner. Up to the newest version here, it takes V1 if V2 lacks a feature."""
    _, config = source.find("vllm.config", "VllmConfig") or ("", None)
    assert config is not None
    chooses = next(node for node in ast.walk(config) if getattr(node, "name", None) == "use_v2_model_runner")
    called = {node.func.attr for node in ast.walk(chooses) if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    assert "_get_v2_model_runner_unsupported_features" in called
    assert "load_lora_model" in source.names("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
