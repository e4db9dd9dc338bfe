"""A transformers model that generates with ladders, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from chunkwise_lora.backends import AnyBackend, Columns, backend_on
from chunkwise_lora.engines.base import adapter_info, config_for, refuse_non_finite
from chunkwise_lora.engines.transformers import attention
from chunkwise_lora.engines.transformers.checks import (
    GenerateOptions,
    check_prompt,
    refuse_model,
    refuse_options,
    refuse_type,
)
from chunkwise_lora.engines.transformers.context import ForwardContext
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.fitting import device_of, fitting_linear, linear_shape, replaced_copies
from chunkwise_lora.engines.transformers.layers import GatedLinear, ReplacedModule
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.engines.transformers.session import Prompts, Session
from chunkwise_lora.engines.transformers.traits import ModelTraits, forward_parameters
from chunkwise_lora.engines.transformers.wide_linear import widens
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule, RankLadder
from chunkwise_lora.method.batch import NO_ADAPTER, AdapterInfo, BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.trace import Trace

logger = logging.getLogger(__name__)

BASE = "__base__"
"""The adapter name of sequences that run without one, as in PEFT."""

DEFAULT = "default"
"""The name of a ladder given without one, as in PEFT."""

CACHE_READERS = ("doge",)
"""Models that use what the cache gives for more than attention, so that all of it must be given."""

PREFILL_TOKENS = 512
"""Longer prompts are prefilled in passes of so many tokens, so that the KV policy keeps the peak of memory low."""


class ChunkWiseModel:
    """Ladders attached to a causal language model of transformers.

    The model keeps its modules, names and weights; attaching replaces the `forward` of the adapted modules and the
    model's `generate`, and `detach` puts them back. Use it as a context manager to detach at the end::

        with ChunkWiseModel(model, ladder) as chunkwise:
            chunkwise.generate(**inputs, max_new_tokens=64)

    Args:
        model: A loaded causal language model, not wrapped by PEFT.
        ladder: A ladder, the folder of a ladder or of a PEFT adapter, or several of these by name.
        config: Settings of the method for all ladders. By default each ladder follows its own policy, and one without
            a policy runs `lossless`.
        fast: Which fast paths may run; by default all that the machine allows.

    Raises:
        EngineError: The ladder does not fit the model's modules, by name or shape, or the model is not supported.
    """

    trace: Trace | None = None
    """What the last call of `generate` did."""

    def __init__(
        self,
        model: PreTrainedModel,
        ladder: RankLadder | str | Path | Mapping[str, RankLadder | str | Path],
        config: ChunkWiseConfig | None = None,
        fast: FastPaths | None = None,
    ) -> None:
        refuse_model(model)
        refuse_type("config", config, ChunkWiseConfig)
        ladders = dict(ladder) if isinstance(ladder, Mapping) else {DEFAULT: ladder}
        if not ladders:
            raise EngineError("give at least one ladder")
        self.model = model
        self.chunkwise_config = config
        """Given for all ladders; None where each follows its own policy."""
        self.ladders: dict[str, RankLadder] = {}
        self._fast = fast or FastPaths()
        self._traits = ModelTraits.of(model)
        self._infos: dict[str, AdapterInfo] = {}
        self._backends: dict[torch.device, AnyBackend] = {}
        self._context = ForwardContext()
        self._session: Session | None = None
        self._linears: dict[str, GatedLinear] = {}
        self._replaced: dict[str, ReplacedModule] = {}
        self._restore: list[Callable[[], None]] = []
        self._depth = 0
        self._planned_by: nn.Module | None = None
        if self._fast.products:
            for name, module in model.named_modules():
                if widens(module) and "forward" not in vars(module):
                    self._linears[name] = self._gated(name, module)
        for name, one in ladders.items():
            self.load_ladder(name, one)
        self.attach()

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        ladder: RankLadder | str | Path | Mapping[str, RankLadder | str | Path],
        config: ChunkWiseConfig | None = None,
        **model_options: Any,
    ) -> ChunkWiseModel:
        """Load the base with `AutoModelForCausalLM.from_pretrained(..., **model_options)` and attach `ladder`."""
        return cls(load_base(model_name_or_path, **model_options), ladder, config)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: do not look for it in itself
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def planner(self) -> BatchPlanner | None:
        """The planner of the generation that is running."""
        return None if self._session is None else self._session.planner

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """What of a KV policy this model does not allow, and why."""
        return list(self._traits.kv_notes) if config.acts else []

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the model runs with its ladders."""
        return bool(self._restore)

    def attach(self) -> Self:
        """Let the model run with its ladders, until `detach`."""
        if self.attached:
            return self
        modules = {name: self.model.get_submodule(name) for name in (*self._linears, *self._replaced)}
        for name, module in modules.items():
            if isinstance(vars(module).get("forward"), (GatedLinear, ReplacedModule)):
                raise EngineError(f"{name}: another ChunkWiseModel is attached to this model; detach that one first")
        for name, module in modules.items():
            self._replace(module, "forward", self._linears.get(name) or self._replaced[name])
        if self._fast.attention and self._traits.carries_out_kv:
            self._use_attention(attention.NAME)
        self._replace(self.model, "generate", self.generate)
        # The body too may be called alone, for hidden states; within a pass of the whole model its hooks do nothing.
        for part in dict.fromkeys((self.model, self.model.base_model)):
            self._restore += [
                part.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove,
                part.register_forward_hook(self._after_pass, always_call=True).remove,
            ]
        return self

    def detach(self) -> PreTrainedModel:
        """Put the model back exactly as it was, and return it."""
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()
        return self.model

    def __enter__(self) -> Self:
        self._depth += 1
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError("a model with ladders attached cannot be copied or pickled; detach() first, then attach anew")

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        own = vars(module)
        before = own.get(name)
        setattr(module, name, value)
        self._restore.append(lambda: own.pop(name) if before is None else own.update({name: before}))

    def _use_attention(self, name: str) -> None:
        """Run `sdpa` attention by the implementation `name` until `detach`; another one stays the user's choice."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        fits = type(self.model)._supports_attention_backend and config.model_type not in CACHE_READERS
        if before == "sdpa" and fits:

            def restore() -> None:
                if config._attn_implementation == name:  # and not the user's later choice
                    config._attn_implementation = before

            config._attn_implementation = name
            self._restore.append(restore)

    # Ladders

    def load_ladder(self, name: str, ladder: RankLadder | str | Path) -> None:
        """Add a ladder under `name`, beside those already loaded."""
        if name == BASE or name in self.ladders:
            raise EngineError(f"adapter name {name!r} is {'reserved' if name == BASE else 'taken'}; choose another")
        if not isinstance(ladder, (RankLadder, str, Path)):
            raise EngineError(f"ladder {name!r} is a {type(ladder).__name__}; give a RankLadder, or a folder")
        ladder = ladder if isinstance(ladder, RankLadder) else RankLadder.load(ladder)
        refuse_non_finite(f"ladder {name!r}", ladder)
        modules = {module: fitting_linear(self.model, module, ladder) for module in ladder.modules}
        copies = replaced_copies(self.model, ladder)
        attached = self.attached
        self.detach()
        dtype = self.model.dtype if self.model.dtype.is_floating_point else torch.float32
        self._load_factors(name, ladder, modules, dtype)
        for module_name, module in copies.items():
            original = self.model.get_submodule(module_name)
            self._replaced.setdefault(module_name, ReplacedModule(original, self._context)).copies[name] = module
        for module_name in self._linears.keys() & self._replaced.keys():  # one adapter's LoRA, another's replacement
            self._linears[module_name].inner = self._replaced[module_name]
        self.ladders[name] = ladder
        self._infos[name] = adapter_info(name, ladder, dtype.itemsize)
        if attached:
            self.attach()

    def _load_factors(
        self, name: str, ladder: RankLadder, modules: Mapping[str, nn.Module], dtype: torch.dtype
    ) -> None:
        """Bring the factors to the backend of each module's device."""
        by_device: dict[torch.device, dict[str, list[LadderModule | None]]] = {}
        for module_name, module in modules.items():
            device = device_of(self.model, module)
            if device not in self._backends:
                self._backends[device] = backend_on(device, dtype, name=None if self._fast.kernels else "torch")
            backend = self._backends[device]
            if module_name not in self._linears:
                self._linears[module_name] = self._gated(module_name, module)
            linear = self._linears[module_name]
            if linear.layer is None:
                shape = linear_shape(module)
                assert shape is not None  # `fitting_linear` says so
                linear.known_as(backend, backend.add_layer(module_name, shape[1], [Columns(0, shape[0])]))
            linear.adapters.add(name)
            by_device.setdefault(device, {})[module_name] = [ladder.modules[module_name]]
        for device, of_device in by_device.items():
            self._backends[device].load(name, of_device)

    def _gated(self, name: str, module: nn.Module) -> GatedLinear:
        return GatedLinear(name, module, self._context, self._fast)

    # Running

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate` with all its options; `trace` tells afterwards what was done.

        Args:
            inputs: (batch, tokens) prompt ids; `input_ids=` does as well. Prompts of a batch are padded on the left.
            generation_config: As for the model's own `generate`.
            adapter_names: The ladder of all prompts, or one name per prompt; `"__base__"` runs without.
                By default the ladder loaded first.
            chunkwise_config: Settings of this call, instead of the model's and of the ladders' policies.
            options: As for the model's own `generate`.

        Raises:
            EngineError: An empty prompt, ids outside the vocabulary, a prompt longer than the model's positions, an
                unknown adapter name, or an option that cannot work with a plan per chunk.
        """
        if not self.attached:
            raise EngineError("the ladders are detached; call attach() first")
        input_ids = options.pop("input_ids", inputs)
        if generation_config is not None:
            options["generation_config"] = generation_config
        asked = GenerateOptions(options, generation_config, self.model.generation_config)
        use_cache = asked.use_cache is not False and "past_key_values" in self._traits.parameters
        refuse_options(asked, use_cache)
        check_prompt(self.model, input_ids, options)
        session = self._new_session(adapter_names, chunkwise_config, input_ids.shape, asked.eos_token_id)
        if use_cache and self._traits.takes_cache:
            options["past_key_values"] = session.cache
            if input_ids.shape[1] > PREFILL_TOKENS and not _pads(options.get("attention_mask")):
                options.setdefault("prefill_chunk_size", PREFILL_TOKENS)
        self.trace = None
        with self._running(session):
            output = type(self.model).generate(self.model, input_ids, **options)
        self.trace = session.trace()
        return output

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        *,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """One forward pass over whole sequences, planned like a prompt; what the model's `forward` returns."""
        if not self.attached:
            raise EngineError("the ladders are detached; call attach() first")
        check_prompt(self.model, input_ids, options)
        session = self._new_session(adapter_names, chunkwise_config, input_ids.shape)
        with self._running(session):
            return self.model(input_ids=input_ids, **options)

    @contextmanager
    def stream(
        self,
        *,
        batch: int = 1,
        prompt_columns: int = 1,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
    ) -> Iterator[Session]:
        """Call the model step by step yourself, as `generate` would, with `past_key_values=session.cache`.

        Used to score text exactly as generation would run it: from `prompt_columns` on, tokens are planned with the
        entropies of the steps before.
        """
        session = self._new_session(adapter_names, chunkwise_config, (batch, prompt_columns))
        with self._running(session):
            yield session

    @contextmanager
    def _running(self, session: Session) -> Iterator[None]:
        if self._session is not None:
            raise EngineError("this model is already generating; use one model per thread")
        self._session = session
        try:
            yield
        finally:
            self._session = None
            self._context.clear()

    def _new_session(
        self,
        adapter_names: str | Sequence[str] | None,
        config: ChunkWiseConfig | None,
        shape: tuple[int, ...],
        eos_token_id: int | Sequence[int] | Tensor | None = None,
    ) -> Session:
        """A generation from prompts of `shape` (batch, columns)."""
        refuse_type("chunkwise_config", config, ChunkWiseConfig)
        batch, columns = shape
        names = adapter_names if adapter_names is not None else next(iter(self.ladders))
        refuse_type("adapter_names", names, str, Sequence)
        names = [names] * batch if isinstance(names, str) else list(names)
        if len(names) != batch:
            raise EngineError(f"adapter_names has {len(names)} names for {batch} prompts; give one per prompt")
        for name in names:
            if name != BASE and name not in self.ladders:
                raise EngineError(f"adapter {name!r} is not loaded; loaded are {', '.join(self.ladders)} and {BASE}")
        configs = [config_for(self.ladders.get(name), call=config, model=self.chunkwise_config) for name in names]
        for note in dict.fromkeys(note for one in configs for note in self.kv_left_undone(one.kv_cache)):
            logger.warning("KV policy: %s", note)
        prompts = Prompts(
            adapters=[NO_ADAPTER if name == BASE else self._infos[name] for name in names],
            configs=configs,
            columns=columns,
            eos_token_ids=[] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist(),
        )
        return Session(self._traits, prompts, self._fast.kernels)

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._planned_by is not None:
            return args, kwargs
        names = self._traits.parameters if module is self.model else forward_parameters(module)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if "past_key_values" in names:
            inputs.setdefault("past_key_values", None)
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise EngineError("plans are made from token ids; pass input_ids, not inputs_embeds")
        session = self._session
        if session is None:
            # A plain call of the model: whole sequences, with the first ladder and no KV policy.
            cache = inputs.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                raise EngineError("ladders are attached, and this cache is not theirs; use ChunkWiseModel.generate")
            session = self._new_session(None, None, input_ids.shape)
            plan = session.before_pass({**inputs, "past_key_values": None})
        else:
            plan = session.before_pass(inputs)
        self._context.begin(plan, session.members, session.is_constant)
        self._planned_by = module
        return (), inputs

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._planned_by:
            return
        self._planned_by = None
        self._context.clear()
        if self._session is not None and output is not None:  # None where the pass has failed
            self._session.after_pass(output[0] if isinstance(output, tuple) else output.logits)


def _pads(mask: Tensor | None) -> bool:
    return mask is not None and not bool(mask.all())
