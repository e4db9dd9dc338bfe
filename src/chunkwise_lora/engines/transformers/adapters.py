"""The LoRA adapters of a `PeftModel` as the engine runs them: their factors in singular basis, in the backends.

PEFT owns the adapters, and its parameters stay as they are. Every adapter that a call uses is compared with what was
loaded before: if its weights, dtype or device have changed, it is loaded again under a new key. Calls that run keep the
version that they began with.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.backends import AnyBackend, backend_on
from chunkwise_lora.engines.base import adapter_info, refuse_non_finite
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.fitting import device_of, linear_shape
from chunkwise_lora.engines.transformers.layers import GatedLayer
from chunkwise_lora.errors import EngineError, LadderError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.ladder.module import LadderModule
from chunkwise_lora.ladder.peft_model import other_parts, plain_adapter, plain_layers, whole_adapter
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo

logger = logging.getLogger(__name__)

AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative difference between a ladder and the weights it stands for; 0.05 for other dtypes."""

SAMPLES = 16
"""How many numbers of a weight are compared before every call."""

ACTIVATED = "activated LoRA"
"""What `other_parts` calls layers that wait for tokens that activate them. PEFT tells each layer where they are."""


@dataclass(eq=False)
class LoadedAdapter:
    """One version of an adapter."""

    name: str
    ladder: RankLadder | None
    """Its plain LoRA modules; None if it has none."""
    info: AdapterInfo
    others: Mapping[str, str]
    """What PEFT runs at full rank: by module name, what it is."""
    state: tuple[object, ...]
    """Identifies the weights, dtype and device that were loaded."""
    calls: int = 0
    """Running calls that use it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What runs at full rank in PEFT, by kind."""
        kinds: dict[str, list[str]] = {}
        for module, kind in self.others.items():
            kinds.setdefault(kind, []).append(module)
        return tuple(
            f"adapter {self.name!r}: {kind} runs in PEFT at full rank ({modules[0]}"
            + (f" and {len(modules) - 1} more)" if len(modules) > 1 else ")")
            for kind, modules in kinds.items()
        )


class Adapters:
    """The loaded versions of a model's adapters.

    Args:
        model: The model.
        base: The model in which PEFT's layers stand.
        fast: Which fast paths may run.
    """

    def __init__(self, model: PeftModel, base: PreTrainedModel, fast: FastPaths) -> None:
        self.layers: Mapping[int, GatedLayer] = {}
        """The replaced LoRA layers of the model by the id of PEFT's layer; set by the owner whenever they change."""
        self._model = model
        self._base = base
        self._fast = fast
        self._given: dict[str, RankLadder] = {}
        self._policies: dict[str, ChunkWiseConfig] = {}
        self._current: dict[str, LoadedAdapter] = {}
        self._retired: list[LoadedAdapter] = []
        self._found: dict[str, tuple[object, dict[str, Any], dict[str, str]]] = {}
        self._backends: dict[tuple[torch.device, torch.dtype], AnyBackend] = {}
        self._numbers = count()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all adapters of the model, in the order of loading."""
        return [*self._model.peft_config]

    @property
    def backend(self) -> AnyBackend | None:
        """The backend of all layers; None if there are several, or none."""
        backends = [*self._backends.values()]
        return backends[0] if len(backends) == 1 else None

    def give(self, name: str, ladder: RankLadder, must_agree: bool = False) -> None:
        """Run adapter `name` by this ladder, as long as it computes what PEFT's weights compute.

        Args:
            name: A loaded adapter.
            ladder: Its ladder.
            must_agree: Whether to compare the ladder with PEFT's weights now.

        Raises:
            EngineError: They do not agree.
            LadderError: The ladder holds NaN or infinity.
        """
        refuse_non_finite(f"adapter {name!r}", ladder)
        if must_agree and not self._agrees(ladder, name):
            raise EngineError(f"adapter {name!r}: the ladder is not that of the weights which the model holds")
        self._given[name] = ladder
        self._found.pop(name, None)

    def give_policy(self, name: str, policy: ChunkWiseConfig) -> None:
        """Run adapter `name` by this policy, with the plain SVD ladder of its weights."""
        self._policies[name] = policy

    def check(self, name: str) -> None:
        """Raise `LadderError` if PEFT's weights of an adapter hold NaN or infinity."""
        if name in self._given:
            return
        for module, layer in self._modules(name)[0].items():
            for side in (layer.lora_A, layer.lora_B):
                if not torch.isfinite(side[name].weight).all():
                    raise LadderError(f"adapter {name!r}: {module} holds NaN or infinity; export the adapter again")

    def forget_modules(self) -> None:
        """Look for the adapters' modules again, because they may have changed."""
        self._found.clear()

    def stale(self, names: Iterable[str]) -> list[str]:
        """Return the adapters among `names` that `load` must load before they can run."""
        return [name for name in names if name not in self._current or self._current[name].state != self._state(name)]

    def load(self, name: str) -> None:
        """Load an adapter as it is now. No pass may run meanwhile.

        Raises:
            EngineError: The model has no such adapter.
            LadderError: Its weights hold NaN or infinity.
        """
        layers, others = self._modules(name)
        if ACTIVATED in others.values():
            raise EngineError(
                f"adapter {name!r} is {ACTIVATED}, which does not run by plan; detach() and run it in PEFT"
            )
        ladder = self._ladder(name)
        base = self._base
        dtype = base.dtype if base.dtype.is_floating_point else torch.float32
        key = f"{name}#{next(self._numbers)}"
        if ladder is None:
            info = AdapterInfo(key, name, np.zeros(1), np.zeros(1, np.int64), LearnedComplexity.neutral())
        else:
            info = adapter_info(key, ladder, dtype.itemsize, name)
            self._load_factors(key, ladder, layers, dtype)
        plain = {id(layer) for layer in layers.values()}
        for layer_id, gated in self.layers.items():
            known = gated.run_by_peft - {name}
            factors: Any = gated.peft.module.lora_A
            gated.run_by_peft = known if layer_id in plain or name not in factors else known | {name}
        if name in self._current:
            self.retire(name)
        state = self._state(name)  # a ladder that no longer fits was dropped
        loaded = self._current[name] = LoadedAdapter(name, ladder, info, others, state)
        for note in loaded.notes:
            logger.info("%s", note)

    @property
    def runs_gated(self) -> bool:
        """Whether all current adapters have plain LoRA modules, so that every pass of the model runs some."""
        return all(loaded.ladder for loaded in self._current.values())

    def complete_ladder(self, loaded: LoadedAdapter) -> RankLadder:
        """Return the ladder of all of an adapter, replaced modules included, so that it can be saved.

        Raises:
            LadderError: The adapter has parts that a ladder cannot hold.
        """
        if loaded.ladder is not None and loaded.ladder is self._given.get(loaded.name):
            return loaded.ladder
        whole = RankLadder.of_adapter(whole_adapter(self._model, loaded.name))
        return replace(whole, policy=self._policies.get(loaded.name))

    def notes_on_order(self, loaded: LoadedAdapter) -> list[str]:
        """Return which plain modules of an adapter run at full rank, because they do not see tokens in their order."""
        gated = (layer for layer in self.layers.values() if loaded.info.key in layer.keys)
        names = [layer.name for layer in gated if not layer.sees_tokens_in_order]
        what = f"{names[0]} and {len(names) - 1} more modules" if len(names) > 1 else "".join(names)
        return [f"adapter {loaded.name!r}: {what} see no tokens in their order and run at full rank"] if names else []

    def hold(self, names: Iterable[str]) -> dict[str, LoadedAdapter] | None:
        """Return the current versions by name, and keep them loaded until `release`; None if one was deleted."""
        with self._lock:
            held = {name: self._current.get(name) for name in names}
            found = {name: loaded for name, loaded in held.items() if loaded is not None}
            if len(found) < len(held):
                return None
            for loaded in found.values():
                loaded.calls += 1
            return found

    def release(self, held: Iterable[LoadedAdapter]) -> bool:
        """End the use of versions, and return whether `free_retired` can free some now."""
        with self._lock:
            for loaded in held:
                loaded.calls -= 1
            return any(not loaded.calls for loaded in self._retired)

    @contextmanager
    def holding(self, infos: Iterable[AdapterInfo]) -> Iterator[None]:
        """Keep the versions loaded with which a cache was made.

        Raises:
            EngineError: One of them was replaced or deleted.
        """
        keys = {info.key: info for info in infos if info is not NO_ADAPTER}
        with self._lock:
            by_key = {loaded.info.key: loaded for loaded in (*self._current.values(), *self._retired)}
            for key, info in keys.items():
                if key not in by_key:
                    raise EngineError(
                        f"adapter {info.name!r} was replaced or deleted since this cache was made; begin again with a "
                        "new cache"
                    )
            held = [by_key[key] for key in keys]
            for loaded in held:
                loaded.calls += 1
        try:
            yield
        finally:
            self.release(held)

    def refuse_if_used_in_peft(self, name: object, *_: object) -> None:
        """Refuse to delete an adapter that running calls use and that PEFT runs in part.

        Raises:
            EngineError: It is so.
        """
        loaded = self._current.get(name) if isinstance(name, str) else None
        if loaded is not None and loaded.calls and loaded.others:
            raise EngineError(
                f"adapter {name!r} is in use by {loaded.calls} calls, and PEFT runs a part of it; wait until they end"
            )

    def forget_deleted(self) -> None:
        """Retire the adapters that PEFT has no more."""
        self.forget_modules()
        for name in [name for name in self._current if name not in self._model.peft_config]:
            self.forget(name)

    def retire(self, name: str) -> None:
        """Free an adapter that was replaced or deleted, as soon as no call uses it."""
        with self._lock:
            loaded = self._current.pop(name, None)
            if loaded is not None:
                self._retired.append(loaded)
        self.free_retired()

    def forget(self, name: str) -> None:
        """Retire an adapter that was deleted, with the ladder given for it."""
        self._given.pop(name, None)
        self._policies.pop(name, None)
        self._found.pop(name, None)
        self.retire(name)

    def free_retired(self) -> None:
        """Free the versions that no call uses any more. No pass may run meanwhile."""
        with self._lock:
            free = [one for one in self._retired if not one.calls]
            self._retired = [one for one in self._retired if one.calls]
        for loaded in free:
            for backend in self._backends.values():
                backend.unload(loaded.info.key)
            for layer in self.layers.values():
                layer.keys.discard(loaded.info.key)
                layer.lost_keys.discard(loaded.info.key)

    def _modules(self, name: str) -> tuple[dict[str, Any], dict[str, str]]:
        config = self._model.peft_config.get(name)
        if config is None:
            raise EngineError(f"adapter {name!r} is not loaded; loaded are {', '.join(self.names)}")
        found = self._found.get(name)
        if found is None or found[0] is not config:
            found = config, dict(plain_layers(self._model, name)), dict(other_parts(self._model, name))
            self._found[name] = found
        return found[1], found[2]

    def _state(self, name: str) -> tuple[object, ...]:
        """Return what changes whenever the adapter computes something else, or computes it elsewhere."""
        layers, _ = self._modules(name)
        return (
            self._base.dtype,
            id(self._given.get(name)),
            *(part for layer in layers.values() for part in _layer_state(layer, name)),
            _samples(layer.weight for pair in layers.values() for layer in (pair.lora_A[name], pair.lora_B[name])),
        )

    def _ladder(self, name: str) -> RankLadder | None:
        given = self._given.get(name)
        if given is not None:
            if self._agrees(given, name):
                return given
            logger.warning(
                "adapter %r: its weights in PEFT are no longer those of its ladder; it runs by the plain SVD ladder of "
                "the new weights, without the old policy",
                name,
            )
            del self._given[name]
            self._policies.pop(name, None)
        if not self._modules(name)[0]:
            return None
        plain = RankLadder.of_adapter(plain_adapter(self._model, name))
        ladder = replace(plain, policy=self._policies.get(name))
        refuse_non_finite(f"adapter {name!r}", ladder)
        return ladder

    def _agrees(self, ladder: RankLadder, name: str) -> bool:
        """Whether a ladder computes what PEFT's weights of an adapter compute."""
        layers, _ = self._modules(name)
        worst = max((_difference(ladder, layers, module, name) for module in layers), default=0.0)
        dtype = next((layer.lora_A[name].weight.dtype for layer in layers.values()), torch.float32)
        return set(ladder.modules) == set(layers) and worst < AGREEMENT.get(dtype, 0.05)

    def _load_factors(self, key: str, ladder: RankLadder, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        by_backend: dict[AnyBackend, dict[str, list[LadderModule | None]]] = {}
        for module, layer in layers.items():
            base_layer = layer.get_base_layer()
            device = device_of(base_layer, self._base.device)
            backend = self._backends.get((device, dtype))
            if backend is None:
                backend = backend_on(device, dtype, name=None if self._fast.kernels else "torch")
                self._backends[device, dtype] = backend
            gated = self.layers[id(layer)]
            shape = linear_shape(base_layer)
            if shape is None:
                shape = ladder.modules[module].up.shape[0], ladder.modules[module].down.shape[1]
            gated.use(backend, shape)
            gated.keys.add(key)
            by_backend.setdefault(backend, {})[gated.name] = [ladder.modules[module]]
        for backend, modules in by_backend.items():
            backend.load(key, modules)


def _layer_state(layer: Any, name: str) -> tuple[object, ...]:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return a.data_ptr(), _version(a), b.data_ptr(), _version(b), a.device, layer.scaling[name]


@torch.no_grad()
def _samples(weights: Iterable[Tensor]) -> bytes:
    """Return some numbers of each weight: PyTorch does not count changes that were made through `.data`."""
    by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        step = max(1, weight.numel() // SAMPLES)
        sample = weight.as_strided((min(SAMPLES, weight.numel()),), (step,)) if weight.is_contiguous() else weight[0]
        by_place.setdefault((weight.device, weight.dtype), []).append(sample)
    return b"".join(torch.cat(samples).double().cpu().numpy().tobytes() for samples in by_place.values())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _difference(ladder: RankLadder, layers: Mapping[str, Any], name: str, adapter: str) -> float:
    """Return the relative difference between the ladder's and PEFT's product, on one random input."""
    module, layer = ladder.modules.get(name), layers[name]
    if module is None:
        return float("inf")
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if module.down.shape[1] != a.shape[1] or module.up.shape[0] != b.shape[0]:
        return float("inf")
    x = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0))
    peft = (b.float().cpu() @ (a.float().cpu() @ x)) * layer.scaling[adapter]
    ours = module.up.float().cpu() @ (module.down.float().cpu() @ x)
    return float((peft - ours).norm() / ours.norm().clamp_min(1e-12))
