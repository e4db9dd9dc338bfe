"""A transformers model that generates with ladders, chunk by chunk."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chunkwise_lora.backends.segments import Factors
from chunkwise_lora.engines.transformers import attention
from chunkwise_lora.engines.transformers.layers import FastPaths, GatedLinear, ReplacedModule, Step, widens
from chunkwise_lora.engines.transformers.session import BASE, AdapterInfo, Session
from chunkwise_lora.errors import EngineError, first_line
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.trace import Trace

logger = logging.getLogger(__name__)

DEFAULT = "default"
"""The name of a ladder given without one, as in PEFT."""

CACHE_READERS = ("doge",)
"""Models that use what the cache gives for more than attention, so that all of it must be given."""

PREFILL_TOKENS = 512
"""Longer prompts are prefilled in passes of so many tokens, so that the KV policy keeps the peak of memory low."""

REFUSED_OPTIONS = {
    "assistant_model": "assisted generation rolls the cache back, which a cache that drops entries cannot",
    "prompt_lookup_num_tokens": "assisted generation rolls the cache back, which a cache that drops entries cannot",
    "assistant_early_exit": "assisted generation rolls the cache back, which a cache that drops entries cannot",
    "use_mtp": "assisted generation rolls the cache back, which a cache that drops entries cannot",
    "guidance_scale": "classifier-free guidance runs the model a second time, out of the order that plans follow",
    "custom_generate": "a custom generation loop is not known to keep sequences in order",
    "cache_implementation": "the KV policy owns the cache; choose a preset or kv_cache settings instead",
    "past_key_values": "the KV policy owns the cache; pass the whole prompt instead",
    "inputs_embeds": "plans are made from token ids; pass input_ids instead",
}


class ChunkWiseModel:
    """Ladders attached to a causal language model of transformers.

    The model keeps its modules, names and weights; attaching replaces the `forward` of the adapted modules and the
    model's `generate`, and `detach` puts them back. Use it as a context manager to detach at the end::

        with ChunkWiseModel(model, ladder) as chunkwise:
            chunkwise.generate(**inputs, max_new_tokens=64)

    Args:
        model: A loaded causal language model, not wrapped by PEFT.
        ladder: A ladder, the folder of a ladder or of a PEFT adapter, or several of these by name.
        config: Settings of the method. By default the policy of the first ladder, or else the `balanced` preset.
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
        _refuse_model(model)
        _refuse_type("config", config, ChunkWiseConfig)
        self.model = model
        self._fast = fast or FastPaths()
        ladders = dict(ladder) if isinstance(ladder, Mapping) else {DEFAULT: ladder}
        if not ladders:
            raise EngineError("give at least one ladder")
        self.ladders: dict[str, RankLadder] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._step = Step()
        self._session: Session | None = None
        self._linears: dict[str, GatedLinear] = {}
        self._replaced: dict[str, ReplacedModule] = {}
        self._restore: list[Callable[[], None]] = []
        self._depth = 0
        self._planned_by: nn.Module | None = None
        self._carries_out, self._kv_notes = _kv_support(model)
        self._learned_positions = _learned_positions(model)
        # A model with a cache of its own kind, as recurrent ones have, keeps it.
        self._takes_cache = model._supports_default_dynamic_cache()
        self._parameters = _parameters(model)
        if self._fast.products:
            for name, module in model.named_modules():
                if widens(module) and "forward" not in vars(module):
                    self._linears[name] = self._gated(name, module)
        for name, one in ladders.items():
            self.load_ladder(name, one)
        policy = next(iter(self.ladders.values())).policy
        self.chunkwise_config = config or policy or ChunkWiseConfig.preset("balanced")
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
        if self._fast.attention and self._carries_out:
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
        for module_name, one in ladder.modules.items():
            if not (one.up.isfinite().all() and one.down.isfinite().all()):
                raise EngineError(f"ladder {name!r}: {module_name} holds NaN or infinity; build the ladder anew")
        for parameter, value in ladder.saved_modules.items():
            if not value.isfinite().all():
                raise EngineError(f"ladder {name!r}: {parameter} holds NaN or infinity; build the ladder anew")
        modules = {module: _fitting_linear(self.model, module, ladder) for module in ladder.modules}
        copies = _replaced_copies(self.model, ladder)
        attached = self.attached
        self.detach()
        dtype = self.model.dtype if self.model.dtype.is_floating_point else torch.float32
        for module_name, module in modules.items():
            if module_name not in self._linears:
                self._linears[module_name] = self._gated(module_name, module)
            self._linears[module_name].factors[name] = Factors(
                ladder.modules[module_name], _device(self.model, module), dtype
            )
        for module_name, module in copies.items():
            original = self.model.get_submodule(module_name)
            self._replaced.setdefault(module_name, ReplacedModule(original, self._step)).copies[name] = module
        for module_name in self._linears.keys() & self._replaced.keys():  # one adapter's LoRA, another's replacement
            self._linears[module_name].inner = self._replaced[module_name]
        self.ladders[name] = ladder
        rung_bytes = [
            sum(module.cost * module.ranks[rung] for module in ladder.modules.values()) * dtype.itemsize
            for rung in range(ladder.rungs)
        ]
        self._infos[name] = AdapterInfo(np.array(ladder.rung_ranks), np.array(rung_bytes), ladder.learned)
        if attached:
            self.attach()

    def _gated(self, name: str, module: nn.Module) -> GatedLinear:
        return GatedLinear(name, module, self._step, self._fast)

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
            chunkwise_config: Settings of this call instead of the model's.
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
        asked = _Asked(options, generation_config, self.model.generation_config)
        use_cache = asked.use_cache is not False and "past_key_values" in self._parameters
        _refuse_options(asked, use_cache)
        self._check_prompt(input_ids, options)
        session = self._new_session(
            adapter_names,
            chunkwise_config,
            len(input_ids),
            input_ids.shape[1],
            asked.eos_token_id,
        )
        if use_cache and self._takes_cache:
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
        self._check_prompt(input_ids, options)
        session = self._new_session(adapter_names, chunkwise_config, len(input_ids), input_ids.shape[1])
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
        session = self._new_session(adapter_names, chunkwise_config, batch, prompt_columns)
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
            self._step.clear()

    def _new_session(
        self,
        adapter_names: str | Sequence[str] | None,
        config: ChunkWiseConfig | None,
        batch: int,
        prompt_columns: int,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
    ) -> Session:
        _refuse_type("chunkwise_config", config, ChunkWiseConfig)
        names = adapter_names if adapter_names is not None else next(iter(self.ladders))
        _refuse_type("adapter_names", names, str, Sequence)
        names = [names] * batch if isinstance(names, str) else list(names)
        if len(names) != batch:
            raise EngineError(f"adapter_names has {len(names)} names for {batch} prompts; give one per prompt")
        for name in names:
            if name != BASE and name not in self.ladders:
                raise EngineError(f"adapter {name!r} is not loaded; loaded are {', '.join(self.ladders)} and {BASE}")
        config = config or self.chunkwise_config
        notes = self._kv_notes if config.kv_cache.acts else []
        for note in notes:
            logger.warning("KV policy: %s", note)
        return Session(
            self.model.config,
            config,
            names,
            self._infos,
            self._step,
            prompt_columns=prompt_columns,
            eos_token_ids=[] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist(),
            carries_out=self._carries_out,
            use_kernels=self._fast.kernels,
            kv_notes=notes,
            positions=self._learned_positions,
        )

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._planned_by is not None:
            return args, kwargs
        names = self._parameters if module is self.model else _parameters(module)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if "past_key_values" in names:
            inputs.setdefault("past_key_values", None)
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise EngineError("plans are made from token ids; pass input_ids, not inputs_embeds")
        if self._session is None:
            # A plain call of the model: whole sequences, with the first ladder and no KV policy.
            cache = inputs.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                raise EngineError("ladders are attached, and this cache is not theirs; use ChunkWiseModel.generate")
            self._new_session(None, None, *input_ids.shape).before_pass({**inputs, "past_key_values": None})
        else:
            self._session.before_pass(inputs)
        self._planned_by = module
        return (), inputs

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._planned_by:
            return
        self._planned_by = None
        self._step.clear()
        if self._session is not None and output is not None:  # None where the pass has failed
            self._session.after_pass(output[0] if isinstance(output, tuple) else output.logits)

    def _check_prompt(self, input_ids: Tensor | None, options: Mapping[str, Any]) -> None:
        kinds = (torch.int64, torch.int32)
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in kinds:
            raise EngineError("input_ids must be a (batch, tokens) tensor of token ids")
        mask = options.get("attention_mask")
        _refuse_type("attention_mask", mask, Tensor)
        if mask is not None and mask.shape != input_ids.shape:
            raise EngineError(
                f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; make them alike"
            )
        lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.sum(-1)
        if not lengths.numel() or not input_ids.shape[1] or not lengths.all():
            raise EngineError("a prompt is empty; give every sequence at least one token (for example the BOS token)")
        rows = self.model.get_input_embeddings().num_embeddings
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= rows:
            raise EngineError(
                f"input_ids hold {low if low < 0 else high}, outside the model's vocabulary of {rows}; "
                "use the tokenizer of this model"
            )
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(lengths.max())
        if positions is not None and longest > positions:
            raise EngineError(
                f"a prompt has {longest} tokens, but the model has {positions} positions; shorten the prompt"
            )


def load_base(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, from safetensors only; raises `EngineError` naming what is wrong."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged folder can raise anything
        raise EngineError(
            f"{name_or_path}: cannot be loaded as a causal language model ({first_line(error)})"
        ) from None
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:
        raise EngineError(
            f"{name_or_path}: has no weights for {len(lacking)} parameters, such as {lacking[0]}; get the whole model"
        )
    return model


def _refuse_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise EngineError(
            f"expected a transformers model, got {type(model).__name__}; of a PeftModel, pass peft_model.unload()"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise EngineError(f"{type(model).__name__} is not a causal language model; load it with AutoModelForCausalLM")


class _Asked:
    """What generate will do: its own options first, then those of a generation config, then the model's."""

    def __init__(self, options: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
        self._options = options
        self._configs = configs

    def __getattr__(self, name: str) -> Any:
        if name in self._options:
            return self._options[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)


def _refuse_type(name: str, value: object, *kinds: type) -> None:
    """Refuse a value of another kind; None stands for a default."""
    if value is not None and not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise EngineError(f"{name} is a {type(value).__name__}; give a {wanted}")


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _refuse_options(asked: _Asked, use_cache: bool) -> None:
    for name, reason in REFUSED_OPTIONS.items():
        value = getattr(asked, name)
        if name == "cache_implementation" and value == "hybrid":
            continue  # stands in old checkpoints; transformers ignores it
        if name == "guidance_scale" and value == 1:
            continue
        if value is not None and value is not False:
            raise EngineError(f"generate: {name} is not supported: {reason}")
    if (asked.num_beams or 1) > 1 and not use_cache:
        raise EngineError("generate: num_beams with use_cache=False is not supported: beams are followed in the cache")


def _pads(mask: Tensor | None) -> bool:
    return mask is not None and not bool(mask.all())


def _learned_positions(model: PreTrainedModel) -> float:
    """How many positions the model has a learned embedding for; unbounded where they are computed."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return math.inf
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and others keep a few rows before the first position.
    return positions if any(0 <= table.num_embeddings - positions <= 2 for table in tables) else math.inf


def _kv_support(model: PreTrainedModel) -> tuple[bool, list[str]]:
    """Whether the engine can carry out KV decisions in this model, and what it leaves undone, and why."""
    config = model.config.get_text_config()
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return False, ["not carried out: ALiBi ties attention to the order of the cache"]
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False, [f"not carried out: {type(model).__name__} derives positions from the cache"]
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return False, [f"not carried out: layers of type {', '.join(other)} are not supported"]
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None):
        return True, ["sliding-window layers keep transformers' own cache, which the window already bounds"]
    return True, []


def _fitting_linear(model: PreTrainedModel, name: str, ladder: RankLadder) -> nn.Module:
    trained_on = f" (the adapter was trained on {ladder.base_model})" if ladder.base_model else ""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise EngineError(
            f"the ladder adapts {name}, which {type(model).__name__} does not have; load the base model{trained_on}"
        ) from None
    shape = _linear_shape(module)
    if shape is None:
        raise EngineError(f"{name} is a {type(module).__name__}, not a linear layer; ladders fit linear layers only")
    factors = ladder.modules[name]
    wanted = (factors.up.shape[0], factors.down.shape[1])
    if shape != wanted:
        raise EngineError(
            f"{name}: the ladder is for (out, in) = {wanted}, the model has {shape}; load the base model{trained_on}"
        )
    return module


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind, quantised ones included."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(str(module.out_features)), int(str(module.in_features))
    return None


def _replaced_copies(model: PreTrainedModel, ladder: RankLadder) -> dict[str, nn.Module]:
    """Copies of the modules that the adapter replaces, with its parameters."""
    copies: dict[str, nn.Module] = {}
    for name, tensor in ladder.saved_modules.items():
        module_name, _, parameter = name.rpartition(".")
        try:
            original = model.get_submodule(module_name)
            shape = original.get_parameter(parameter).shape
        except AttributeError:
            raise EngineError(f"the adapter replaces {name}, which {type(model).__name__} does not have") from None
        if shape != tensor.shape:
            raise EngineError(f"{name}: the adapter holds {tuple(tensor.shape)}, the model {tuple(shape)}")
        module = copies.setdefault(module_name, copy.deepcopy(original))
        value = tensor.to(_device(model, original), original.get_parameter(parameter).dtype)
        setattr(module, parameter, nn.Parameter(value, requires_grad=False))
    return copies


def _device(model: PreTrainedModel, module: nn.Module) -> torch.device:
    hook = getattr(module, "_hf_hook", None)  # accelerate's, where weights are offloaded
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    weight = next(module.parameters(), None)
    return model.device if weight is None else weight.device
