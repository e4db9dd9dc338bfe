"""Manages ladders in a vLLM worker, in place of vLLM's LoRA adapters.

vLLM gives every layer `max_loras` slots of `max_lora_rank`, even if the adapters' ranks are lower. Here a layer has no
slots: each ladder has its own factors at its own rank, and runs in the `Segment`s of a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace as replace_fields
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.lora.layers import LoRAMapping, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name, replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from chunkwise_lora.backends import AnyBackend, Columns, Limits, backend_on
from chunkwise_lora.engines.base import adapter_info
from chunkwise_lora.engines.vllm import loading, reports, settings
from chunkwise_lora.engines.vllm.budget import ABSENT, WHOLE
from chunkwise_lora.engines.vllm.graphs import GraphPass
from chunkwise_lora.engines.vllm.layers import (
    ClassifierWithLadders,
    EmbeddingAdapters,
    EmbeddingWithLadders,
    Head,
    HeadAdapters,
    LayerAdapters,
    RunningPass,
)
from chunkwise_lora.errors import ChunkWiseError, EngineError, LadderError, shown
from chunkwise_lora.ladder import LadderModule, RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo

logger = logging.getLogger("vllm.chunkwise")

LARGEST_HEAD = 258_048
"""Entries of the largest vocabulary for which vLLM adapts the output head. With others, it would not start."""


@dataclass
class LoadedLadder:
    """A ladder in this worker's memory."""

    id: int
    info: AdapterInfo
    config: ChunkWiseConfig
    """The config of requests that do not ask for another one."""
    modules: dict[str, list[LadderModule | None]]
    """For each layer of the model, by name: the part of its modules that this tensor-parallel rank computes."""
    head: Head | None = None
    """The head of a classifier that takes the place of the model's."""

    def up_to(self, rung: int) -> dict[str, list[LadderModule | None]]:
        """Return a copy of the modules without the directions above a rung."""
        rung = min(rung, len(self.info.rung_ranks) - 1)
        return {
            layer: [None if module is None else module.up_to(rung) for module in modules]
            for layer, modules in self.modules.items()
        }


@dataclass
class Held:
    """What an adapter has on the device."""

    info: AdapterInfo
    nbytes: int
    """Bytes of the factors."""
    rank: float
    """The rank of the highest rung."""


class LadderManager(LRUCacheLoRAModelManager):
    """Loads ladders into the layers of a model and unloads them."""

    supported_lora_modules: list[str]
    layers: dict[str, LayerAdapters | HeadAdapters | EmbeddingAdapters | ClassifierWithLadders]
    backend: AnyBackend
    running: RunningPass
    on_load: Callable[[Held], None]
    """Called with each ladder that was copied to the device."""
    on_unload: Callable[[str], None]
    """Called with the key of each ladder that leaves the device."""
    _has_slots = True

    def __init__(self, model: nn.Module, *arguments: Any, vllm_config: VllmConfig, **options: Any) -> None:
        self._static_context = vllm_config.compilation_config.static_forward_context
        self._dtype = vllm_config.model_config.dtype
        self._adapters_of_head: set[str] = set()
        self._classifier: ClassifierWithLadders | None = None
        server = settings.of_server(vllm_config.additional_config)
        self.rungs: dict[int, int] | None = None if server.adapter_memory is None else {}
        """The highest rung that each adapter may have on the device, by id. None: there is no budget."""
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes or []
        self._graph_sizes: list[int] | None = sizes if server.cuda_graphs else None
        """Numbers of tokens for which vLLM captures CUDA graphs. None: it captures none."""
        self.on_load = lambda _: None
        self.on_unload = lambda _: None
        super().__init__(model, *arguments, vllm_config=vllm_config, **options)

    @property
    def lora_slots(self) -> int:
        """Number of adapters that the device may hold; 0 while layers are wrapped, so that vLLM allocates no slots."""
        if not self._has_slots:
            return 0
        return self.lora_config.max_loras if self.rungs is None else self.lora_config.max_cpu_loras

    def _create_lora_modules(self) -> None:
        # Only linear layers, embeddings and the output head: vLLM would wrap routed experts as well.
        kinds = (LinearBase, VocabParallelEmbedding)
        usable = {name.rpartition(".")[2] for name, part in self.model.named_modules() if isinstance(part, kinds)}
        usable.discard("lm_head")
        if self.vocab_size <= LARGEST_HEAD:
            usable.add("lm_head")
        heads: set[str] = getattr(self, "supported_modules_to_save", set())  # of classifiers, since 0.31
        if self.is_pooling_model and (not heads or self._pooling_task != "classify"):
            heads = set()
            usable.difference_update(loading.HEADS)
        self.supported_modules_to_save = heads
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name in usable]
        self._has_slots = False
        super()._create_lora_modules()
        self._has_slots = True
        self._choose_backend()
        self.layers = {}
        for name, module in [*self.modules.items()]:
            if isinstance(module, LogitsProcessorWithLoRA):
                columns = [Columns(0, module.vocab_size)]
                layer = self.backend.add_layer(name, module.hidden_size, columns)
                self.layers[name] = HeadAdapters(layer, self.running, self._adapters_of_head)
                module.set_mapping(self.layers[name])
                continue
            if name in heads:
                self._adapt_classifier(name, module.base_layer)
                continue
            if isinstance(module, VocabParallelEmbeddingWithLoRA):
                self._adapt_embedding(name, module.base_layer)
                continue
            if not isinstance(module, BaseLinearLayerWithLoRA):
                continue
            offsets = np.cumsum([0, *module.output_slices]).tolist()
            columns = [Columns(*where) for where in zip(offsets, module.output_slices, strict=False)]
            layer = self.backend.add_layer(name, module.input_size, columns)
            adapters = self.layers[name] = LayerAdapters(layer, self.running)
            self._static_context[adapters.key] = adapters
            module.set_mapping(adapters)
        if isinstance(self.running, GraphPass) and self._graph_sizes is not None:
            self.running.reserve(self._graph_sizes)

    def _choose_backend(self) -> None:
        graphs = self._graph_sizes is not None
        rank = self.lora_config.max_lora_rank if graphs else 0
        limits = Limits(self.max_num_batched_tokens, self.lora_slots, rank)
        self.backend = backend_on(self.device, self._dtype, limits)
        self.running = GraphPass(self.backend) if graphs else RunningPass(self.backend)

    def _adapt_embedding(self, name: str, base_layer: VocabParallelEmbedding) -> None:
        """Replace vLLM's LoRA layer of an embedding, which needs slots."""
        columns = [Columns(0, base_layer.embedding_dim)]
        layer = self.running.embeddings.add_layer(name, base_layer.org_vocab_size, columns)
        adapters = self.layers[name] = EmbeddingAdapters(layer, self.running)
        self._static_context[adapters.key] = adapters
        self.modules[name] = replace_submodule(self.model, name, EmbeddingWithLadders(base_layer, adapters))

    def _adapt_classifier(self, name: str, base_layer: LinearBase) -> None:
        """Replace vLLM's LoRA layer of a classifier's head, which needs slots."""
        layer = self.backend.add_layer(name, base_layer.input_size, [Columns(0, base_layer.output_size)])
        self._classifier = self.layers[name] = ClassifierWithLadders(base_layer, layer, self.running)
        self.modules[name] = replace_submodule(self.model, name, self._classifier)
        self.model.pooler.replace_classifier(self._classifier)

    def head_of(self, ladder: RankLadder, path: str) -> Head | None:
        """Return the head of a classifier that a ladder brings, if it does.

        Raises:
            LadderError: The model has no such head, or one with other inputs.
        """
        if not ladder.saved_modules:
            return None
        name = self._classifier and self._classifier.layer.name
        width = self._classifier and self._classifier.layer.in_features
        weight, bias = (ladder.saved_modules.get(f"{name}.{parameter}") for parameter in ("weight", "bias"))
        if weight is None or weight.shape[1:] != (width,) or (bias is not None and bias.shape != weight.shape[:1]):
            found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sorted(ladder.saved_modules.items()))
            needed = "has no head of a classifier" if name is None else f"has the head {name} with {width} inputs"
            raise LadderError(
                f"{path}: replaces {found} (modules_to_save), but {type(self.model).__name__} in vLLM {needed}; give "
                "the base model that the adapter was trained on"
            )
        return Head(weight, bias)

    def share_of(self, ladder: RankLadder, path: str) -> dict[str, list[LadderModule | None]]:
        """Return the part of a ladder's modules that this tensor-parallel rank computes, by layer of the model.

        Raises:
            LadderError: The ladder does not fit the model's layers, by name or shape.
        """
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        left = {parse_fine_tuned_lora_name(f"{name}.lora_A.weight", mapper)[0]: name for name in ladder.modules}
        shares: dict[str, list[LadderModule | None]] = {}
        for layer in self.layers:
            names = [self._taken(left, name) for name in self.packed_modules.get(layer, [layer])]
            if any(names):
                found = [None if name is None else ladder.modules[name] for name in names]
                shares[layer] = self._share(layer, found, path)
        left = {name: original for name, original in left.items() if self._match_target_modules(name)}
        if left:
            raise LadderError(
                f"{path}: adapts {', '.join(sorted(left.values())[:3])}{' and others' if len(left) > 3 else ''}, where "
                f"{type(self.model).__name__} in vLLM has no linear layer (routed experts are not supported); "
                "train the adapter on linear layers of this base model"
            )
        return shares

    def _taken(self, names: dict[str, str], layer: str) -> str | None:
        """Remove the name in a ladder of a layer's module from `names`, and return it, or None."""
        if layer not in names and self.is_pooling_model:  # an adapter of a model without a head
            layer = layer.removeprefix("model.")
        return names.pop(layer, None)

    def _share(self, layer: str, modules: list[LadderModule | None], path: str) -> list[LadderModule | None]:
        wrapped, product = self.modules[layer], self.layers[layer].layer
        columns = product.columns
        if len(modules) != len(columns):
            raise LadderError(
                f"{path}: {layer} computes {len(columns)} modules, the ladder has {len(modules)}; not supported"
            )
        downs: Any = [None if module is None else module.down for module in modules]
        ups: Any = [None if module is None else module.up for module in modules]
        if isinstance(wrapped, BaseLinearLayerWithLoRA) and wrapped.tp_size > 1:  # others are whole on all ranks
            single = len(self.packed_modules.get(layer, [])) <= 1  # these layers of vLLM take tensors, not lists
            downs = [wrapped.slice_lora_a(downs[0])] if single else wrapped.slice_lora_a(downs)
            ups = [wrapped.slice_lora_b(ups[0])] if single else wrapped.slice_lora_b(ups)
        shares: list[LadderModule | None] = []
        for module, down, up, where in zip(modules, downs, ups, columns, strict=True):
            if module is None:
                shares.append(None)
                continue
            if down.shape[1] != product.in_features or up.shape[0] != where.width:
                raise LadderError(
                    f"{path}: {layer} takes {down.shape[1]} inputs to {up.shape[0]} outputs in the ladder, but "
                    f"{product.in_features} to {where.width} in the model; give the base model that it was trained on"
                )
            shares.append(
                loading.prepared(LadderModule(up, down, module.sigma, module.ranks), self.lora_config.lora_dtype)
            )
        return shares

    def adapts_head(self, adapter: str) -> bool:
        """Return whether a loaded ladder adapts the output head."""
        return adapter in self._adapters_of_head

    # The interface that vLLM's managers expect

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> Any:
        """Return an empty ladder for warm-up. No memory is reserved for ladders that are not loaded."""
        info = replace(NO_ADAPTER, key=str(lora_id), name=f"warm-up {lora_id}")
        return LoadedLadder(lora_id, info, ChunkWiseConfig.preset("lossless"), {})

    def _add_adapter(self, lora: Any) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """Copy a registered ladder's factors to the device. Returns whether they were not there yet."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        ladder = self._registered_adapters[lora_id]
        rung = WHOLE if self.rungs is None else self.rungs.get(lora_id, WHOLE)
        modules = ladder.modules if self.rungs is None else ladder.up_to(rung)
        embeddings = {name: part for name, part in modules.items() if isinstance(self.layers[name], EmbeddingAdapters)}
        self.backend.load(str(lora_id), {name: part for name, part in modules.items() if name not in embeddings})
        if embeddings:
            self.running.embeddings.load(str(lora_id), embeddings)
        self._active_adapters[lora_id] = None
        if any(isinstance(self.layers[name], HeadAdapters) for name in ladder.modules):
            self._adapters_of_head.add(ladder.info.key)
        self._activate_head(ladder)
        if modules:  # those of vLLM's warm-up have none
            ranks = ladder.info.rung_ranks
            self.on_load(Held(ladder.info, _nbytes(modules), float(ranks[min(rung, len(ranks) - 1)])))
        return True

    def _activate_head(self, ladder: LoadedLadder) -> None:
        classifier = self._classifier
        if classifier is not None and classifier.layer.name in ladder.modules:
            classifier.adapters.add(ladder.info.key)
        if classifier is not None and ladder.head is not None:
            like: Any = classifier.base_layer.weight
            weight, bias = ladder.head
            classifier.heads[ladder.info.key] = Head(weight.to(like), None if bias is None else bias.to(like))

    def _deactivate_adapter(self, lora_id: int) -> None:
        self._unload(str(lora_id))

    def _unload(self, adapter: str) -> None:
        self.backend.unload(adapter)
        self.running.embeddings.unload(adapter)
        self._adapters_of_head.discard(adapter)
        if self._classifier is not None:
            self._classifier.adapters.discard(adapter)
            self._classifier.heads.pop(adapter, None)
        self.on_unload(adapter)

    def remove_all_adapters(self) -> None:
        """Remove all ladders."""
        super().remove_all_adapters()
        for adapter in self.backend.adapters:
            self._unload(adapter)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """Start a new pass. No adapter runs until the pass is planned."""
        self.running.begin(len(mapping.index_mapping))


def _nbytes(modules: dict[str, list[LadderModule | None]]) -> int:
    found = (module for of_layer in modules.values() for module in of_layer if module is not None)
    return sum(module.up.nbytes + module.down.nbytes for module in found)


class LadderWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads the adapter that a `LoRARequest` names, as a ladder."""

    _manager_cls = LadderManager

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        self._server = settings.of_server(vllm_config.additional_config)
        self.failed: dict[int, str] = {}
        """The message for each adapter of the running pass that could not be loaded, by id."""
        self.reload: set[int] = set()
        """Adapters that a new request of the pass asks to load again (`load_inplace`)."""
        self.on_remove: Callable[[str], None] = lambda _: None
        """Called with the key of each adapter that a user removes."""

    @property
    def ladders(self) -> LadderManager:
        """The manager of the model's layers."""
        return self._adapter_manager

    def loaded(self, lora_id: int) -> LoadedLadder:
        """Return the ladder of a running request."""
        return self._adapter_manager._registered_adapters.cache[lora_id]

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Add an empty ladder for the time when vLLM measures memory and compiles."""
        return self._adapter_manager.add_adapter(
            self._adapter_manager.create_dummy_lora(lora_request.lora_int_id, rank)
        )

    def remove_adapter(self, adapter_id: int) -> bool:
        """Remove an adapter and its metrics, because a user asks for it. vLLM's front end does not use it again."""
        self.on_remove(str(adapter_id))
        return super().remove_adapter(adapter_id)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter, unless it is loaded, and copy its factors to the device. Returns True, as in vLLM.

        If one tensor-parallel rank cannot do this, none does.

        Raises:
            LadderError: The adapter cannot be loaded. The message begins with `reports.SAYS`.
        """
        self._load(lora_request)
        if self.ladders.rungs is None:  # with a budget, the adapter's first request brings it to the device
            self._activate(lora_request.lora_int_id, lora_request.lora_path)
        return True

    def _load(self, lora_request: LoRARequest) -> None:
        """Load an adapter into memory, unless it is there."""
        ladders, lora_id = self.ladders, lora_request.lora_int_id
        if lora_id not in self.list_adapters() or lora_request.load_inplace:
            with _all_ranks_or_none(lora_request.lora_path):
                ladder = self._load_adapter(lora_request)  # before another one is removed
            ladders.remove_adapter(lora_id)
            if len(ladders) >= ladders.capacity:
                ladders.remove_oldest_adapter()
            ladders.add_adapter(ladder)
        ladders.get_adapter(lora_id)  # marks it as used

    def _activate(self, lora_id: int, path: str) -> None:
        """Copy a loaded adapter to the device, unless it is there."""
        ladders = self.ladders
        if lora_id in ladders._active_adapters:
            ladders.activate_adapter(lora_id)
            return
        try:
            with _all_ranks_or_none(path):
                ladders.activate_adapter(lora_id)
        except LadderError:
            ladders._deactivate_adapter(lora_id)  # frees what was copied until then
            ladders.remove_adapter(lora_id)
            raise

    def hold(self, rungs: Mapping[int, int]) -> None:
        """Change the highest rung of adapters on the device. Those that are not there get it when they are needed."""
        if self.ladders.rungs is None:
            return
        self.ladders.rungs.update(rungs)
        changed = [lora_id for lora_id in rungs if self.ladders.deactivate_adapter(lora_id)]  # first, to make room
        for lora_id in changed:
            if rungs[lora_id] != ABSENT:
                with suppress(LadderError):  # its next request loads it again, and reports the error
                    self._activate(lora_id, self.loaded(lora_id).info.name)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Make the adapters of a pass ready. `failed` then names those that could not be loaded."""
        self.failed = {}
        loaded = self.list_adapters()
        # Adapters in memory come first, so that they are not removed to make room for others of the same pass.
        for request in sorted(lora_requests, key=lambda one: (one.lora_int_id not in loaded, one.lora_int_id)):
            lora_id = request.lora_int_id
            is_again = request.load_inplace and lora_id in loaded and lora_id not in self.reload
            try:
                self._load(replace_fields(request, load_inplace=False) if is_again else request)
                self._activate(lora_id, request.lora_path)
            except LadderError as error:
                self.failed[lora_id] = str(error)

    def _load_adapter(self, lora_request: LoRARequest) -> Any:
        path = get_adapter_absolute_path(lora_request.lora_path)
        ladder = loading.load(path)
        info = adapter_info(
            str(lora_request.lora_int_id), ladder, self.lora_config.lora_dtype.itemsize, lora_request.lora_name
        )
        config = loading.config_of(ladder, self._server, path)
        modules, head = self.ladders.share_of(ladder, path), self.ladders.head_of(ladder, path)
        if self.ladders.rungs is not None and self.device.type == "cpu":  # here, the device's memory is all there is
            modules = loading.off_memory(modules)
        return LoadedLadder(lora_request.lora_int_id, info, config, modules, head)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Pin an adapter, as vLLM does.

        Raises:
            EngineError: There is a budget, by which the scheduler decides what stays.
        """
        if self.ladders.rungs is not None:
            raise EngineError("an adapter cannot be pinned on a server with adapter_memory; remove one of both")
        return super().pin_adapter(adapter_id)


@contextmanager
def _all_ranks_or_none(adapter: str) -> Iterator[None]:
    """Raise the same `LadderError` on all tensor-parallel ranks if the block fails on one of them."""
    message = None
    try:
        yield
    except ChunkWiseError as error:
        message = str(error)
    except Exception as error:  # any failure must stay with the requests for this adapter
        logger.exception("ChunkWise LoRA: %s: could not be loaded", shown(adapter))
        message = f"{shown(adapter)}: could not be loaded: {error}"
    if get_tensor_model_parallel_world_size() > 1:
        group = get_tp_group()
        messages: list[str | None] = [None] * group.world_size
        torch.distributed.all_gather_object(messages, message, group=group.cpu_group)
        message = next(filter(None, messages), None)
    if message is not None:
        raise LadderError(reports.SAYS + shown(message, reports.LONGEST))
