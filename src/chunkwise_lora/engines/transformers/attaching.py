"""Replaces the methods of a model while it runs by plan, and takes turns with the passes that run."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from chunkwise_lora.engines.transformers import attention
from chunkwise_lora.engines.transformers.adapters import Adapters
from chunkwise_lora.engines.transformers.attachment import Attachment
from chunkwise_lora.engines.transformers.context import PASS
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.injection import Injection
from chunkwise_lora.engines.transformers.replacements import ReplacedForwards
from chunkwise_lora.engines.transformers.traits import ModelTraits, forward_parameters
from chunkwise_lora.engines.transformers.turns import Ends, Turns
from chunkwise_lora.engines.transformers.versions import CACHE_NAMES
from chunkwise_lora.errors import EngineError

INJECTING = ("load_adapter", "add_adapter", "delete_adapter", "add_weighted_adapter")
"""Methods of PEFT that change which modules a model has."""

SWITCHING = ("set_adapter", "disable_adapter_layers", "enable_adapter_layers")
"""Methods of PEFT that change which adapters run."""

MERGING = ("merge_adapter", "unmerge_adapter")
"""Methods of PEFT that change the base's weights."""

REMOVING = ("unload", "merge_and_unload")
"""Methods of PEFT that take the adapters out of the model."""


class AttachedModel(ABC):
    """A model whose methods, and those of PEFT, ask this object what to do while it is attached.

    Args:
        model: The model.
        injection: PEFT's modules, if they were put into a bare model only for this object.
        fast: Which fast paths may run.
    """

    def __init__(self, model: PeftModel, injection: Injection | None, fast: FastPaths) -> None:
        self.model = model
        self.base: PreTrainedModel = model.get_base_model()
        self.turns = Turns()
        self.traits = ModelTraits.of(self.base)
        self.adapters = Adapters(model, self.base, fast)
        self._injection = injection
        self._fast = fast
        self._attachment = Attachment()
        self._forwards = ReplacedForwards(self, self.base, self.traits, fast)
        self._changes = False
        """Whether a change of modules runs."""

    @abstractmethod
    def run(self, called: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run a forward pass of the model or its body.

        Args:
            called: The module that is called.
            forward: Its own forward.
            inputs: Its keyword arguments.
        """

    @abstractmethod
    def generate(self, *args: Any, **options: Any) -> Any:
        """Replaces `generate` of the base model; see `ChunkWiseModel.generate`."""

    @abstractmethod
    def request(self, *, adapter_names: Sequence[str] | None = None, **options: Any) -> AbstractContextManager[None]:
        """Replaces PEFT's hooks for `adapter_names`, which are state of the model, by state of the call."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError("a model that is attached cannot be copied or pickled; detach() first, then attach again")

    @property
    def attached(self) -> bool:
        """Whether the model runs by plan."""
        return bool(self._attachment)

    def attach(self) -> None:
        """Let the model run by plan.

        Raises:
            EngineError: The model is attached to another runner.
        """
        if self.attached:
            return
        with self.turns.a_change("attach()"):
            if isinstance(vars(self.base).get("forward"), _Planned):
                raise EngineError("another ChunkWiseModel is attached to this model; detach that one first")
            if self._injection is not None and not self._injection.is_in:
                self._injection.put_in()
            try:
                self._replace_methods()
            except BaseException:
                self._undo()
                raise

    def _undo(self) -> None:
        """Give the model its own methods and modules back."""
        self._attachment.undo()
        if self._injection is not None:
            self._injection.take_out()

    def _replace_methods(self) -> None:
        """Let the model's methods ask this runner."""
        replace = self._attachment.replace
        # The inner model may also be called alone, for hidden states. Inside a pass of the model it just runs.
        for called in dict.fromkeys((self.base, self.base.base_model)):
            replace(called, "forward", _Planned(self, called))
        replace(self.base, "generate", self.generate)
        tuner = self.model.base_model
        replace(tuner, "_enable_peft_forward_hooks", self.request)
        for target in (self.model, tuner):
            for name in (*INJECTING, *SWITCHING, *MERGING):
                if hasattr(type(target), name):
                    replace(target, name, self._in_turn(target, name))
        for name in REMOVING:
            replace(tuner, name, self._refusing(name, "call detach() first"))
        replace(self.base, "load_adapter", self._refusing("load_adapter", "use ChunkWiseModel.load_adapter"))
        replace(self.base, "add_adapter", self._refusing("add_adapter", "use ChunkWiseModel.load_adapter"))
        for target in (self.model, self.base):
            replace(target, "_apply", self._in_turn(target, "_apply"))
        if self._fast.attention and self.traits.carries_out_kv:
            self._attachment.use_attention(self.base, attention.NAME)
        self._refresh()

    def detach(self) -> nn.Module:
        """Restore the model to its state before `attach`, and return it. See `ChunkWiseModel.detach`.

        Raises:
            EngineError: The thread is inside a generation or a pass of the model.
        """
        if self.attached:
            with self.turns.a_change("detach()", Ends.CALLS):
                self._undo()
        return self.model if self._injection is None else self.base

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Change the modules of the adapters while no pass runs. `what` names the change in errors."""
        with self.turns.a_change(what, Ends.CALLS_IN_PEFT):
            if self._changes:
                yield
                return
            outside = self._injection is not None and not self._injection.is_in
            if self._injection is not None and outside:
                self._injection.put_in()
            self._forwards.restore(self._attachment)  # PEFT may copy modules
            self._changes = True
            try:
                yield
            finally:
                self._changes = False
                self.adapters.forget_deleted()
                if self.attached:
                    self._refresh()
                if self._injection is not None and outside:
                    self._injection.take_out()

    def _refresh(self) -> None:
        self._forwards.refresh(self._attachment)
        self.adapters.layers = self._forwards.gated

    def _in_turn(self, target: nn.Module, name: str) -> Callable[..., Any]:
        """Return a method of PEFT or PyTorch that runs while no pass does."""
        method = getattr(target, name)

        @functools.wraps(method)
        def in_turn(*args: Any, **kwargs: Any) -> Any:
            if not self.attached:
                return method(*args, **kwargs)
            what = f"{name}()"
            # PEFT's set_adapter unmerges first.
            changes_base = name in ("_apply", *MERGING) or (name == "set_adapter" and self._is_merged())
            ends = Ends.CALLS if changes_base else Ends.CALLS_IN_PEFT
            with self.change(what) if name in INJECTING else self.turns.a_change(what, ends):
                if name == "delete_adapter":
                    self.adapters.refuse_if_used_in_peft(*args, *kwargs.values())
                return method(*args, **kwargs)

        return in_turn

    def _refusing(self, name: str, remedy: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise EngineError(f"{name}() is not possible while the model runs by plan; {remedy}")

        return refuse

    def _is_merged(self) -> bool:
        """Return whether an adapter is merged into the base's weights."""
        return any(one.merged for one in self._forwards.asked())


class _Planned:
    """Replaces the `forward` of a model, or of its body."""

    def __init__(self, runner: AttachedModel, module: nn.Module) -> None:
        self._runner = runner
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._parameters = forward_parameters(module)
        functools.update_wrapper(self, self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = PASS.get()
        runner = self._runner
        if not runner.attached or (running is not None and running.owner is runner):
            return self._forward(*args, **kwargs)
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        name = runner.traits.cache_name
        for other in CACHE_NAMES:
            if other != name and name is not None and other in inputs:
                inputs[name] = inputs.pop(other)
        return runner.run(self._module, self._forward, inputs)
