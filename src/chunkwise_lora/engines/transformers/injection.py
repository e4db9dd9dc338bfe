"""Puts adapters into a model through PEFT, and takes PEFT's modules out again without a trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkwise_lora.engines.transformers.fitting import device_of, refuse_other_base
from chunkwise_lora.engines.transformers.layers import BASE
from chunkwise_lora.errors import EngineError, first_line
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.ladder.adapter_source import AdapterSource
from chunkwise_lora.ladder.peft_files import PREFIX
from chunkwise_lora.ladder.peft_model import base_parameters
from chunkwise_lora.method.config import ChunkWiseConfig

Source = RankLadder | str | Path
"""Where an adapter comes from: a ladder, or the folder or name of a ladder or of a PEFT adapter."""


@dataclass(frozen=True)
class Adapter:
    """An adapter to load: what PEFT needs, and its ladder."""

    name: str
    config: Mapping[str, Any]
    """Fields of `LoraConfig`."""
    tensors: Mapping[str, Tensor]
    """As PEFT's `adapter_model.safetensors` names them."""
    ladder: RankLadder | None
    """None if it is built from the loaded weights."""
    policy: ChunkWiseConfig | None = None
    """The policy that was found without a ladder."""

    @classmethod
    def of(cls, name: str, source: object) -> Adapter:
        """Read an adapter.

        Raises:
            EngineError: The name cannot be used, or the source is of the wrong kind.
            LadderError: The source cannot be read.
        """
        refuse_name(name)
        if not isinstance(source, (RankLadder, str, Path)):
            raise EngineError(f"adapter {name!r} is a {type(source).__name__}; give a RankLadder, or a folder")
        read = AdapterSource.of(source) if isinstance(source, RankLadder) else AdapterSource.load(source)
        return cls(name, read.config, read.tensors, read.ladder, read.policy)

    def lora_config(self) -> LoraConfig:
        """Return PEFT's config of the adapter. PEFT changes it."""
        return LoraConfig(**copy.deepcopy({**self.config, "inference_mode": True}))


def refuse_name(name: object) -> None:
    """Raise `EngineError` for adapter names that PEFT cannot hold."""
    if not isinstance(name, str) or not name or "." in name:
        raise EngineError(f"adapter name {name!r} cannot be used; choose a text without dots")
    if name in (BASE, "weight", "bias") or hasattr(nn.ModuleDict(), name):  # PEFT keeps adapters in a ModuleDict
        raise EngineError(f"adapter name {name!r} is reserved; choose another")


class Injection:
    """PEFT's modules in a bare model. They can be taken out and put in again.

    Args:
        base: A model without adapters.
        adapter: The first adapter.

    Raises:
        EngineError: The adapter does not fit the model. The model is then as before.
    """

    def __init__(self, base: PreTrainedModel, adapter: Adapter) -> None:
        self._base = base
        self._trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self.is_in = True
        """Whether the base holds PEFT's modules."""
        self._others: dict[str, Tensor] = {}
        """Parameters of the base that the adapter overwrites: their other values, by PEFT's names."""
        self._modules: dict[tuple[nn.Module, str], nn.Module] = {}
        """Parent and name of PEFT's modules while they are taken out."""
        refuse_other_base(base, adapter.tensors, adapter.config)
        config = adapter.lora_config()
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        try:
            with torch.random.fork_rng(devices=[]):  # PEFT draws weights, which are replaced
                self.model: PeftModel = kind(base, config, adapter_name=adapter.name)
            self._peft_config = self.model.peft_config
            overwritten = base_parameters(self.model, adapter.tensors)
            self._others = {key: parameter.clone() for key, parameter in overwritten.items()}
            _set_weights(self.model, adapter)
        except BaseException as error:
            self.take_out()
            if isinstance(error, Exception):
                raise _does_not_fit(base, adapter, error) from None
            raise

    def take_out(self) -> None:
        """Give the base its own modules and parameters back."""
        self._swap_parameters()
        outermost: list[str] = []
        for name, module in [*self._base.named_modules(remove_duplicate=False)]:
            is_inside = name.startswith(tuple(f"{other}." for other in outermost))
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not is_inside:
                outermost.append(name)
                parent, _, child = name.rpartition(".")
                self._modules[self._base.get_submodule(parent), child] = module
        for (holder, child), module in self._modules.items():
            setattr(holder, child, _original(module))
        vars(self._base).pop("peft_config", None)
        self.is_in = False
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def put_in(self) -> None:
        """Give the base PEFT's modules again, after `take_out`."""
        self._base.requires_grad_(False)
        for (holder, child), module in self._modules.items():
            setattr(holder, child, module)
        self._modules.clear()
        self._swap_parameters()
        self.is_in = True
        self._base.peft_config = self._peft_config

    @torch.no_grad()
    def _swap_parameters(self) -> None:
        for key, parameter in base_parameters(self.model, self._others).items() if self._others else ():
            current = parameter.clone()
            parameter.copy_(self._others[key])
            self._others[key] = current


def add_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Load another adapter into a model. It does not become the active one.

    Raises:
        EngineError: The adapter does not fit the model. The model is then as before.
    """
    base = model.base_model.model
    refuse_other_base(base, adapter.tensors, adapter.config)
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights, which are replaced
            model.add_adapter(adapter.name, adapter.lora_config())
        _refuse_another_base(model, adapter)
        _set_weights(model, adapter)
    except BaseException as error:
        if adapter.name in model.peft_config:
            model.delete_adapter(adapter.name)
        if isinstance(error, Exception):
            raise _does_not_fit(base, adapter, error, beside=[*model.peft_config]) from None
        raise


def _refuse_another_base(model: PeftModel, adapter: Adapter) -> None:
    """Refuse an adapter that would change parameters of the base under the other adapters."""
    for key, parameter in base_parameters(model, adapter.tensors).items():
        if not torch.equal(parameter, adapter.tensors[key].to(parameter)):
            raise EngineError(f"it changes the base's {key}, which the other adapters use; give it a model of its own")


def _set_weights(model: PeftModel, adapter: Adapter) -> None:
    """Set the weights of an adapter that PEFT has added, which must be complete."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # see `_keep_in_memory`
        result = set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=adapter.name)
    unknown = list(result.unexpected_keys)
    mark = f".{adapter.name}"
    tied = tuple(
        f"{PREFIX}{name}."
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None
    )
    missing = [
        key
        for key in result.missing_keys
        if (f"{mark}." in key or key.endswith(mark)) and not key.startswith(tied or " ")
    ]
    if unknown or missing:
        raise ValueError(
            f"{len(unknown)} of its weights have no place in the model{_such_as(unknown)}, and {len(missing)} are "
            f"missing{_such_as(missing)}"
        )
    _keep_in_memory(model, adapter)
    offloaded = [key for key, parameter in model.named_parameters() if f"{mark}." in key and parameter.is_meta]
    if offloaded:
        raise EngineError(
            f"{offloaded[0]} belongs to an offloaded module; load the base with a device_map that keeps the modules in "
            "memory that the adapter changes"
        )
    base = model.base_model.model
    model.training = model.base_model.training = base.training
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.train(base.training)  # PEFT's new modules train, and would drop out


def _keep_in_memory(model: PeftModel, adapter: Adapter) -> None:
    """Give LoRA layers of offloaded modules their factors, which PEFT offloads as well, without storing them."""
    base = model.base_model.model
    for name, layer in base.named_modules():
        for side in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
            factors: Any = getattr(layer, side)
            factor = factors[adapter.name] if adapter.name in factors else None  # noqa: SIM401 - a ModuleDict has no get
            tensor = adapter.tensors.get(f"{PREFIX}{name}.{side}.weight")
            if factor is not None and factor.weight.is_meta and tensor is not None:
                value = tensor.to(device_of(layer.get_base_layer(), base.device), factor.weight.dtype)
                factor.weight = nn.Parameter(value, requires_grad=False)


def _such_as(keys: list[str]) -> str:
    return f" (such as {keys[0]})" if keys else ""


def _does_not_fit(base: nn.Module, adapter: Adapter, error: Exception, beside: Sequence[str] = ()) -> Exception:
    if isinstance(error, EngineError):
        return EngineError(f"adapter {adapter.name!r}: {error}")
    trained_on = adapter.config.get("base_model_name_or_path")
    remedy = f"load the base model that it was trained on{f', {trained_on}' if trained_on else ''}"
    if beside:
        remedy += (
            f", or give the adapter a model of its own if it is the adapters {', '.join(beside)} that it conflicts with"
        )
    return EngineError(f"adapter {adapter.name!r} does not fit {type(base).__name__}: {_cause(error)}; {remedy}")


def _cause(error: Exception) -> str:
    """Return the line of an error that names the cause: PyTorch puts it after a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else first_line(error)


def _original(module: Any) -> nn.Module:
    """Return the module of the base that a module of PEFT stands for."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            original: nn.Module = module
            return original


def carries_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters whose modules are in a model."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            names |= dict.fromkeys(sorted(module._get_available_adapters()))
    return list(names)
