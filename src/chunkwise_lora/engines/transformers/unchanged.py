"""Notices when a model's weights or code have changed since a graph of it was captured."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class Unchanged:
    """What a captured forward pass of a model depends on: its modules, where its weights lie, and its hooks.

    Adapters do not belong to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [*_modules(model)]
        self._children = [
            (module._modules, name, child)
            for module in self._modules
            for name, child in module._modules.items()
            if child is not None and not (isinstance(module, LoraLayer) and name != "base_layer")
        ]
        self._tensors = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        ]
        self._forwards = [(vars(module), vars(module).get("forward")) for module in self._modules]

    def __bool__(self) -> bool:
        """Return whether a captured pass still computes what the model computes now."""
        return (
            all(children.get(name) is child for children, name, child in self._children)
            and all(
                tensors.get(name) is tensor and tensor.data_ptr() == address
                for tensors, name, tensor, address in self._tensors
            )
            and all(attributes.get("forward") is forward for attributes, forward in self._forwards)
        )

    @property
    def has_hooks(self) -> bool:
        """Whether some module inside of the model runs Python code beside its forward, which a graph would not run."""
        return any(
            module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
            for module in self._modules
            if module is not self._model
        )


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all modules in it, without those of adapters."""
    yield module
    children = [module.get_base_layer()] if isinstance(module, LoraLayer) else module.children()
    for child in children:
        yield from _modules(child)
