"""A transformers model that runs with ladders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from chunkwise_lora.engines.base import adapter_info, config_for, refuse_non_finite
from chunkwise_lora.engines.transformers import attention
from chunkwise_lora.engines.transformers.adapted_modules import AdaptedModules
from chunkwise_lora.engines.transformers.attachment import Attachment
from chunkwise_lora.engines.transformers.checks import (
    GenerateOptions,
    check_prompt,
    refuse_model,
    refuse_options,
    refuse_type,
)
from chunkwise_lora.engines.transformers.context import ForwardContext
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.layers import GatedLinear, ReplacedModule
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.engines.transformers.session import Prompts, Session
from chunkwise_lora.engines.transformers.traits import ModelTraits, forward_parameters
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo
from chunkwise_lora.method.trace import Trace

logger = logging.getLogger(__name__)

BASE = "__base__"
"""The adapter name of sequences that run without an adapter, as in PEFT."""

DEFAULT = "default"
"""The name of a ladder that was given without a name, as in PEFT."""

PREFILL_TOKENS = 512
"""Longer prompts are prefilled in passes of this number of tokens, so that the KV policy limits the peak of memory."""


class ChunkWiseModel:
    """Ladders attached to a causal language model of transformers.

    The model keeps its modules, names and weights. Attaching replaces the `forward` of the adapted modules and the
    model's `generate`, and `detach` restores them. Use it as a context manager to detach at the end::

        with ChunkWiseModel(model, ladder) as chunkwise:
            chunkwise.generate(**inputs, max_new_tokens=64)

    Args:
        model: A loaded causal language model, not wrapped by PEFT.
        ladder: A ladder, the folder of a ladder or of a PEFT adapter, or several of these by name.
        config: Settings of the method for all ladders. By default each ladder follows its own policy; a ladder
            without a policy runs `lossless`.
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
        """The config for all ladders; None if each ladder follows its own policy."""
        self.ladders: dict[str, RankLadder] = {}
        self._fast = fast or FastPaths()
        self._traits = ModelTraits.of(model)
        self._infos: dict[str, AdapterInfo] = {}
        self._context = ForwardContext()
        self._modules = AdaptedModules(model, self._context, self._fast)
        self._attachment = Attachment()
        self._session: Session | None = None
        self._depth = 0
        self._planned_by: nn.Module | None = None
        for name, given in ladders.items():
            self.load_ladder(name, given)
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
        """The planner of the running generation; None if there is none."""
        return None if self._session is None else self._session.planner

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that this model does not allow, and the reasons."""
        return list(self._traits.kv_notes) if config.acts else []

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the model runs with its ladders."""
        return bool(self._attachment)

    def attach(self) -> Self:
        """Let the model run with its ladders, until `detach` is called.

        Raises:
            EngineError: Another `ChunkWiseModel` is attached to the model.
        """
        if self.attached:
            return self
        replacements = {self.model.get_submodule(name): new for name, new in self._modules.replacements().items()}
        for module in replacements:
            if isinstance(vars(module).get("forward"), (GatedLinear, ReplacedModule)):
                raise EngineError("another ChunkWiseModel is attached to this model; detach that one first")
        for module, replacement in replacements.items():
            self._attachment.replace(module, "forward", replacement)
        if self._fast.attention and self._traits.carries_out_kv:
            self._attachment.use_attention(self.model, attention.NAME)
        self._attachment.replace(self.model, "generate", self.generate)
        # The inner model may also be called alone, for hidden states. Inside a pass of the model its hooks do nothing.
        for called in dict.fromkeys((self.model, self.model.base_model)):
            self._attachment.hook(called, self._before_pass, self._after_pass)
        return self

    def detach(self) -> PreTrainedModel:
        """Restore the model to its state before `attach`, and return it."""
        self._attachment.undo()
        return self.model

    def __enter__(self) -> Self:
        self._depth += 1
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            "a model with ladders attached cannot be copied or pickled; detach() first, then attach again"
        )

    # Ladders

    def load_ladder(self, name: str, ladder: RankLadder | str | Path) -> None:
        """Load another ladder and call it `name`.

        Raises:
            EngineError: The name is taken or reserved, or the ladder does not fit the model.
            LadderError: The ladder cannot be read, or holds NaN or infinity.
        """
        if name == BASE or name in self.ladders:
            raise EngineError(f"adapter name {name!r} is {'reserved' if name == BASE else 'taken'}; choose another")
        if not isinstance(ladder, (RankLadder, str, Path)):
            raise EngineError(f"ladder {name!r} is a {type(ladder).__name__}; give a RankLadder, or a folder")
        ladder = ladder if isinstance(ladder, RankLadder) else RankLadder.load(ladder)
        refuse_non_finite(f"ladder {name!r}", ladder)
        dtype = self.model.dtype if self.model.dtype.is_floating_point else torch.float32
        attached = self.attached
        self.detach()
        try:
            self._modules.load(name, ladder, dtype)
            self.ladders[name] = ladder
            self._infos[name] = adapter_info(name, ladder, dtype.itemsize)
        finally:
            if attached:
                self.attach()

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
        """Generate like transformers' `generate`, with all its options. Afterwards `trace` tells what was done.

        Args:
            inputs: (batch, tokens) prompt ids; `input_ids=` has the same meaning. Pad prompts of a batch on the left.
            generation_config: As for the model's own `generate`.
            adapter_names: The ladder of all prompts, or one name per prompt; `"__base__"` means no
                ladder. By default it is the ladder loaded first.
            chunkwise_config: Settings of this call, which override those of the model and the ladders' policies.
            options: As for the model's own `generate`.

        Raises:
            EngineError: A prompt is empty, holds ids outside the vocabulary or is longer than the model's positions, an
                adapter name is unknown, or an option cannot work with a plan per chunk.
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
        """Run one forward pass over whole sequences, planned like prompts. Returns the model's output."""
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
        """Open a session for calling the model step by step, as `generate` does, with `past_key_values=session.cache`.

        Use it to score text exactly as generation would run it: from `prompt_columns` on, tokens are planned with the
        entropies of the previous steps.
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
        """Return a session for prompts of `shape` (batch, columns)."""
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
        for note in dict.fromkeys(note for applied in configs for note in self.kv_left_undone(applied.kv_cache)):
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
                raise EngineError(
                    "with ladders attached, the model cannot continue this cache; use ChunkWiseModel.generate"
                )
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
