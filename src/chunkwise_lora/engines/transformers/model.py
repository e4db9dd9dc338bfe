"""A transformers model that runs its LoRA adapters by plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from chunkwise_lora.engines.transformers.calls import Call, running_call
from chunkwise_lora.engines.transformers.checks import refuse_model, refuse_type
from chunkwise_lora.engines.transformers.context import REQUEST, Request, request_of, within
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.injection import Adapter, Injection, Source, add_adapter, carries_adapters
from chunkwise_lora.engines.transformers.layers import BASE
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.engines.transformers.runner import Runner
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.trace import Trace

__all__ = ["BASE", "DEFAULT", "ChunkWiseModel"]

DEFAULT = "default"
"""The name of an adapter that was given without a name, as in PEFT."""


class ChunkWiseModel(nn.Module):
    """A causal language model whose LoRA adapters run with a rank per chunk.

    It drives a `PeftModel`, which keeps its adapters, names and habits: `load_adapter`, `set_adapter`,
    `delete_adapter`, `adapter_names`, `save_pretrained` and training work as in PEFT. What this class does not have
    is looked up in that model. Attaching replaces methods of the model and of its modules; `detach` restores them::

        with ChunkWiseModel(peft_model):
            peft_model.generate(**inputs, max_new_tokens=64)

    Any number of threads may call the model at once, with different adapters. Calls that train or record gradients run
    as in PEFT, at full rank.

    Args:
        model: A `PeftModel` with LoRA adapters, or a causal language model without adapters.
        ladder: A ladder, the folder or name of a ladder or of a PEFT adapter, or several of these by adapter name. A
            model without adapters needs one. For a `PeftModel`, it gives ladders to loaded adapters, or loads more
            adapters; an adapter without a ladder runs by the plain SVD of its weights.
        config: Settings of the method for all adapters. By default each follows its ladder's policy; a ladder without a
            policy runs `lossless`.
        fast: Which fast paths may run; by default all that the machine allows.

    Raises:
        EngineError: An adapter does not fit the model, or the model is not supported.
        LadderError: An adapter cannot be read.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        ladder: Source | Mapping[str, Source] | None = None,
        config: ChunkWiseConfig | None = None,
        fast: FastPaths | None = None,
    ) -> None:
        super().__init__()
        refuse_type("config", config, ChunkWiseConfig)
        adapters = [Adapter.of(name, source) for name, source in _by_name(model, ladder).items()]
        injection = None
        if isinstance(model, PeftModel):
            _refuse_other_tuners(model)
            refuse_model(model.get_base_model())
        else:
            refuse_model(model)
            if carried := carries_adapters(model):
                raise EngineError(
                    f"the model already carries the LoRA adapters {', '.join(carried)}; pass the PeftModel itself, or "
                    "take them out with unload() first"
                )
            if not adapters:
                raise EngineError("the model has no adapters; give a ladder, or pass a PeftModel")
            injection = Injection(model, adapters[0])
            model = injection.model
        self.model = model
        """The model that runs."""
        self.training = model.training
        self._runner = Runner(model, injection, config, fast or FastPaths())
        self._depths = _Depths()
        try:
            for adapter in adapters:
                self._take(adapter, is_loaded=injection is not None and adapter is adapters[0])
            self.attach()
        except BaseException:
            if injection is not None:
                injection.take_out()
            raise

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        ladder: Source | Mapping[str, Source],
        config: ChunkWiseConfig | None = None,
        **model_options: Any,
    ) -> ChunkWiseModel:
        """Load the base with `AutoModelForCausalLM.from_pretrained(..., **model_options)` and attach `ladder`."""
        return cls(load_base(model_name_or_path, **model_options), ladder, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model in which PEFT's layers stand."""
        return self._runner.base

    @property
    def input_device(self) -> torch.device:
        """The device that takes token ids: that of the embedding. Other layers may lie on other devices."""
        return self._runner.input_device

    @property
    def chunkwise_config(self) -> ChunkWiseConfig | None:
        """The config for all adapters; None if each follows its ladder's policy."""
        return self._runner.config

    @property
    def ladders(self) -> Mapping[str, RankLadder]:
        """The ladder of each adapter, in the order of loading."""
        return _Ladders(self._runner)

    @property
    def trace(self) -> Trace | None:
        """What the last call of `generate` in this thread did, or in any thread if this one made none."""
        return self._runner.trace

    @property
    def planner(self) -> BatchPlanner | None:
        """The planner of the call that runs in this thread; None if there is none."""
        call = running_call(self._runner)
        return None if call is None else call.planner

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that this model does not allow, and the reasons."""
        return self._runner.kv_left_undone(config)

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the model runs by plan."""
        return self._runner.attached

    def attach(self) -> Self:
        """Let the model run by plan, until `detach` is called.

        Raises:
            EngineError: Another `ChunkWiseModel` is attached to the model.
        """
        self._runner.attach()
        return self

    def detach(self) -> nn.Module:
        """Restore the model to its state before `attach`, and return it: the `PeftModel`, or the model without adapters
        if this was made from one. It waits for running generations of other threads.

        Raises:
            EngineError: The thread is inside a generation or a pass of the model.
        """
        return self._runner.detach()

    def __enter__(self) -> Self:
        self._depths.count += 1
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self._depths.count -= 1
        if not self._depths.count:
            self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError("a ChunkWiseModel cannot be copied or pickled; detach() first, and copy the model")

    # Adapters

    def load_adapter(self, source: Source, adapter_name: str = DEFAULT) -> None:
        """Load an adapter, while other calls run. It replaces an adapter of the same name.

        Args:
            source: A ladder, or the folder or name of a ladder or of a PEFT adapter.
            adapter_name: What to call it.

        Raises:
            EngineError: The name is reserved, or the adapter does not fit the model. All is then as before.
            LadderError: The adapter cannot be read, or holds NaN or infinity.
        """
        adapter = Adapter.of(adapter_name, source)
        with self._runner.change("load_adapter()"):
            self._replace(adapter) if adapter_name in self.model.peft_config else self._take(adapter)

    def _take(self, adapter: Adapter, is_loaded: bool = False) -> None:
        """Load an adapter under a new name, or give a loaded one its ladder."""
        if adapter.name in self.model.peft_config:
            if adapter.ladder is None and not is_loaded:
                raise EngineError(f"adapter {adapter.name!r} is loaded already; give a ladder for it, or another name")
            with self._runner.change("giving a ladder"):
                self._describe(adapter, must_agree=not is_loaded)
            return
        with self._runner.change("load_adapter()"):
            add_adapter(self.model, adapter)
            try:
                self._describe(adapter)
            except BaseException:
                self.model.delete_adapter(adapter.name)
                raise
            if not self.model.base_model.active_adapters:  # the only adapter, after all others were deleted
                self.model.set_adapter(adapter.name, inference_mode=True)

    def _describe(self, adapter: Adapter, must_agree: bool = False) -> None:
        """Tell the runner what PEFT does not know about a loaded adapter, and check the adapter's weights."""
        adapters = self._runner.adapters
        if adapter.ladder is not None:
            adapters.give(adapter.name, adapter.ladder, must_agree)
        elif adapter.policy is not None:
            adapters.give_policy(adapter.name, adapter.policy)
        adapters.check(adapter.name)

    def _replace(self, adapter: Adapter) -> None:
        """Load an adapter under a name that is taken."""
        free = next(name for n in count() if (name := f"{adapter.name}__{n}") not in self.model.peft_config)
        trial = replace(adapter, name=free)
        self._take(trial)  # if it fails, the old one is still there
        self.model.delete_adapter(trial.name)
        active = [*self.model.base_model.active_adapters]
        self.model.delete_adapter(adapter.name)
        self._runner.adapters.forget(adapter.name)
        self._take(adapter)
        if adapter.name in active:
            self.model.base_model.set_adapter(active, inference_mode=True)

    # Running

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
            adapter_names: The adapter of all prompts, or one name per prompt; `"__base__"` means no adapter. By default
                it is PEFT's active adapter.
            chunkwise_config: Settings of this call, which override those of the model and the ladders' policies.
            options: As for the model's own `generate`. `past_key_values` may be the cache of an earlier call;
                `inputs` then begin with the tokens of that call.

        Raises:
            EngineError: A prompt is empty, holds ids outside the vocabulary or is longer than the model's positions, an
                adapter name is unknown, or an option cannot work with a plan per chunk.
        """
        if not self.attached:
            raise EngineError("the model is detached; call attach() first")
        with within(REQUEST, Request(self._runner, adapter_names, chunkwise_config)):
            return self._runner.generate(inputs, generation_config, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Run one forward pass of the model, as `model(...)` does.

        A pass without a cache is planned as a prompt. With `use_cache`, the output holds a cache that the next pass, or
        `generate`, can go on with.

        The parameters that the `Trainer` looks for have names of their own here.

        Args:
            input_ids: (batch, tokens) token ids.
            args: As for the model's own forward.
            attention_mask: As for the model's own forward.
            labels: As for the model's own forward.
            adapter_names: As for `generate`.
            chunkwise_config: As for `generate`.
            options: As for the model's own forward.
        """
        if not self.attached:
            raise EngineError("the model is detached; call attach() first")
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if args:
            args = (named.pop("input_ids"), *args)
        options |= {name: tensor for name, tensor in named.items() if tensor is not None}
        model = self.model if self.model.peft_config else self.base  # PeftModel's forward needs an adapter
        if adapter_names is None and chunkwise_config is None:
            return model(*args, **options)
        with within(REQUEST, Request(self._runner, adapter_names, chunkwise_config)):
            return model(*args, **options)

    def stream(
        self,
        *,
        batch: int = 1,
        prompt_columns: int = 1,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
    ) -> AbstractContextManager[Call]:
        """Open a call for calling the model step by step, as `generate` does, with `past_key_values=call.cache`.

        Use it to score text exactly as generation would run it: from `prompt_columns` on, tokens are planned with the
        entropies of the previous steps.
        """
        asked = request_of(self._runner)
        request = Request(self._runner, adapter_names or asked.adapter_names, chunkwise_config or asked.config)
        return self._runner.stream(request, batch, prompt_columns)


class _Ladders(Mapping[str, RankLadder]):
    """The ladders of a model's adapters, each built when it is asked for."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getitem__(self, name: str) -> RankLadder:
        if name not in self._runner.adapters.names:
            raise KeyError(name)
        with self._runner.using([name]) as used:
            assert used[0] is not None
            with self._runner.turns.a_pass():
                return self._runner.adapters.complete_ladder(used[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._runner.adapters.names)

    def __len__(self) -> int:
        return len(self._runner.adapters.names)


class _Depths(threading.local):
    """How many `with` blocks of the current thread hold a model attached."""

    count = 0


def _by_name(model: object, ladder: Source | Mapping[str, Source] | None) -> Mapping[str, Source]:
    if ladder is None:
        return {}
    if isinstance(ladder, Mapping):
        if not ladder:
            raise EngineError("give at least one ladder")
        return ladder
    active = model.base_model.active_adapters if isinstance(model, PeftModel) else []
    return {active[0] if active else DEFAULT: ladder}


def _refuse_other_tuners(model: PeftModel) -> None:
    for name, config in model.peft_config.items():
        if config.peft_type != PeftType.LORA:
            raise EngineError(f"adapter {name!r} is {config.peft_type}, not LoRA; delete it, or run the model in PEFT")
