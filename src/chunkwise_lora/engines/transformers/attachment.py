"""Changes to a model that can be undone: replaced methods, another attention function, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

CACHE_READERS = ("doge",)
"""Model types that use the cached states for more than attention, so that the cache must return all of them."""


class Attachment:
    """The changes made to a model so far. The object is true if there are any."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def undo(self) -> None:
        """Undo all changes, the last one first."""
        while self._undo:
            self._undo.pop()()

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the object `module`, which hides the attribute of its class."""
        attributes = vars(module)
        before = attributes.get(name)
        setattr(module, name, value)
        self._undo.append(lambda: attributes.pop(name) if before is None else attributes.update({name: before}))

    def hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Call `before` and `after` around the module's forward; `after` is called even if the forward fails."""
        self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(module.register_forward_hook(after, always_call=True).remove)

    def use_attention(self, model: PreTrainedModel, name: str) -> None:
        """Run the attention function `name` in place of `sdpa`. If the user chose another function, keep that one."""
        config = model.config.get_text_config()
        before = config._attn_implementation
        fits = type(model)._supports_attention_backend and config.model_type not in CACHE_READERS
        if before == "sdpa" and fits:

            def restore() -> None:
                if config._attn_implementation == name:  # unless the user has changed it since
                    config._attn_implementation = before

            config._attn_implementation = name
            self._undo.append(restore)
