"""Changes to a model that can be undone: replaced methods, another attention function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

CACHE_READERS = ("doge",)
"""Model types that use the cached states for more than attention, so that the cache must return all of them."""


class Attachment:
    """The changes made to a model so far. The object is true if there are any."""

    def __init__(self) -> None:
        self._replaced: dict[tuple[int, str], tuple[object, str, object, bool]] = {}
        """By id of the object and name of the attribute: both, what replaced it, and whether the object had its own."""
        self._before: dict[tuple[int, str], object] = {}
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced or self._undo)

    def undo(self) -> None:
        """Undo all changes."""
        for key in [*self._replaced]:
            self._restore(key)
        while self._undo:
            self._undo.pop()()

    def replace(self, target: object, name: str, value: object) -> None:
        """Set an attribute of the object `target`, which hides the attribute of its class."""
        key = id(target), name
        if key in self._replaced:
            self._restore(key)
        attributes = vars(target)
        self._replaced[key] = target, name, value, name in attributes
        self._before[key] = attributes.get(name)
        attributes[name] = value  # not setattr, which would register a module as a child

    def restore(self, target: object, name: str) -> None:
        """Undo the replacement of one attribute, if there is one."""
        if (id(target), name) in self._replaced:
            self._restore((id(target), name))

    def use_attention(self, model: PreTrainedModel, name: str) -> None:
        """Run the attention function `name` in place of `sdpa`. If the user chose another function, keep that one."""
        config = model.config.get_text_config(decoder=True)
        before = config._attn_implementation
        fits = type(model)._supports_attention_backend and config.model_type not in CACHE_READERS
        if before == "sdpa" and fits:

            def restore() -> None:
                if config._attn_implementation == name:  # unless the user has changed it since
                    config._attn_implementation = before

            config._attn_implementation = name
            self._undo.append(restore)

    def _restore(self, key: tuple[int, str]) -> None:
        target, name, value, had_own = self._replaced.pop(key)
        before = self._before.pop(key)
        attributes: dict[str, Any] = vars(target)
        if attributes.get(name) is not value:
            return  # something else has replaced it since, and calls our value, which does nothing any more
        if had_own:
            attributes[name] = before
        else:
            del attributes[name]
