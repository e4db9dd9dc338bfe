"""A registry of interchangeable parts: a config chooses a part by its name, and a new part needs only one new file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from chunkwise_lora.errors import ConfigError, shown

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Maps names to factories of one kind of part.

    A factory is a class, or any callable that returns the part (for example `functools.partial(Part, setting=3)`).
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._factories: dict[str, Callable[..., T]] = {}
        self._settings: dict[str, frozenset[str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, in order of registration."""
        return tuple(self._factories)

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Return a decorator that registers a factory under `name`.

        A factory may replace one of the same module and qualified name, so that a notebook cell can run twice.

        Raises:
            ConfigError: The name is not made of lower-case letters, digits and underscores, or another factory has it.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError(
                f"{self._kind} name {name!r}: use lower-case letters, digits and underscores, a letter first"
            )

        def add(factory: Factory) -> Factory:
            taken = self._factories.get(name)
            if taken is not None and _identity(taken) != _identity(factory):
                raise ConfigError(f"{self._kind} name {name!r} is taken by {_identity(taken)}; choose another name")
            self._factories[name] = factory
            self._settings[name] = frozenset(inspect.signature(factory).parameters)
            return factory

        return add

    def remove(self, name: str) -> None:
        """Remove `name`, for example at the end of a test."""
        del self._factories[name]

    def check(self, name: str, where: str) -> None:
        """Check that `name` is registered. `where` names the config field in the error.

        Raises:
            ConfigError: The name is not registered. The message lists the registered names.
        """
        if name not in self._factories:
            raise ConfigError(
                f"{where}: {self._kind} {shown(repr(name))} is not registered; registered are {', '.join(self.names)}. "
                "Import the module that registers it first, or correct the name"
            )

    def factory(self, name: str) -> Callable[..., T]:
        """Return the factory that is registered under `name`."""
        self.check(name, "registry")
        return self._factories[name]

    def create(self, name: str, settings: Mapping[str, Any] | None = None) -> T:
        """Create the part `name`. Its factory gets those of `settings` that it has parameters for."""
        factory, known = self.factory(name), self._settings[name]
        return factory(**{key: value for key, value in (settings or {}).items() if key in known})


def _identity(factory: Callable[..., Any]) -> str:
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}.{named.__qualname__}"
