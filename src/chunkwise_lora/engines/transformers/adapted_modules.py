"""The modules of a model that adapters change, with the adapters' factors on each module's device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from chunkwise_lora.backends import AnyBackend, Columns, backend_on
from chunkwise_lora.engines.transformers.context import ForwardContext
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.fitting import device_of, fitting_linear, linear_shape, replaced_copies
from chunkwise_lora.engines.transformers.layers import GatedLinear, ReplacedModule
from chunkwise_lora.engines.transformers.wide_linear import widens
from chunkwise_lora.ladder import LadderModule, RankLadder


class AdaptedModules:
    """The replacements for the `forward` of all modules that an adapter or a fast path changes."""

    def __init__(self, model: PreTrainedModel, context: ForwardContext, fast: FastPaths) -> None:
        self._model = model
        self._context = context
        self._fast = fast
        self._linears: dict[str, GatedLinear] = {}
        self._replaced: dict[str, ReplacedModule] = {}
        self._backends: dict[torch.device, AnyBackend] = {}
        if fast.products:
            for name, module in model.named_modules():
                if widens(module) and "forward" not in vars(module):
                    self._linears[name] = GatedLinear(name, module, context, fast)

    def replacements(self) -> dict[str, GatedLinear | ReplacedModule]:
        """Return the replacement for each module's `forward`, by module name."""
        return {**self._replaced, **self._linears}

    def load(self, adapter: str, ladder: RankLadder, dtype: torch.dtype) -> None:
        """Copy a ladder's factors and replaced modules to the model's devices.

        The model must be detached, because the replacements call the modules' own `forward`.

        Raises:
            EngineError: The ladder does not fit the model. Nothing is changed then.
        """
        modules = {name: fitting_linear(self._model, name, ladder) for name in ladder.modules}
        copies = replaced_copies(self._model, ladder)
        self._load_factors(adapter, ladder, modules, dtype)
        for name, module in copies.items():
            if name not in self._replaced:
                self._replaced[name] = ReplacedModule(self._model.get_submodule(name), self._context)
            self._replaced[name].copies[adapter] = module
        # One adapter may add a LoRA to a module that another adapter replaces.
        for name in self._linears.keys() & self._replaced.keys():
            self._linears[name].inner = self._replaced[name]

    def _load_factors(
        self, adapter: str, ladder: RankLadder, modules: Mapping[str, nn.Module], dtype: torch.dtype
    ) -> None:
        by_device: dict[torch.device, dict[str, list[LadderModule | None]]] = {}
        for name, module in modules.items():
            device = device_of(self._model, module)
            if device not in self._backends:
                self._backends[device] = backend_on(device, dtype, name=None if self._fast.kernels else "torch")
            backend = self._backends[device]
            if name not in self._linears:
                self._linears[name] = GatedLinear(name, module, self._context, self._fast)
            linear = self._linears[name]
            if linear.layer is None:
                shape = linear_shape(module)
                assert shape is not None  # checked by `fitting_linear`
                linear.set_backend(backend, backend.add_layer(name, shape[1], [Columns(0, shape[0])]))
            linear.adapters.add(adapter)
            by_device.setdefault(device, {})[name] = [ladder.modules[name]]
        for device, device_modules in by_device.items():
            self._backends[device].load(adapter, device_modules)
