"""Which modules of a model get another `forward`, and which."""

from __future__ import annotations

from threading import RLock

from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from chunkwise_lora.engines.transformers.attachment import Attachment
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.layers import Asked, GatedLayer, PeftLayer
from chunkwise_lora.engines.transformers.traits import ModelTraits
from chunkwise_lora.engines.transformers.wide_linear import WideLinear, widens

NOT_LINEAR = (Embedding, MultiheadAttention, ParamWrapper, _ConvNd)
"""LoRA layers of PEFT that never are plain LoRA on a linear layer."""

_PARAMETERS = RLock()
"""Held while PEFT runs LoRA on a bare parameter of any model: PyTorch caches the parameter for the whole process."""


class ReplacedForwards:
    """The replaced `forward` of PEFT's layers and, on a CPU that emulates half precision, of all linear layers.

    Args:
        owner: Stands for the model in its passes.
        base: The model in which PEFT's layers stand.
        traits: Facts about it.
        fast: Which fast paths may run.
    """

    def __init__(self, owner: object, base: PreTrainedModel, traits: ModelTraits, fast: FastPaths) -> None:
        self.gated: dict[int, GatedLayer] = {}
        """The LoRA layers that can run by plan, by the id of PEFT's layer."""
        self._owner = owner
        self._base = base
        self._traits = traits
        self._fast = fast
        self._turn = RLock()
        self._found: dict[int, tuple[nn.Module, GatedLayer | PeftLayer | WideLinear]] = {}

    def restore(self, attachment: Attachment) -> None:
        """Give all modules their own forward back, until `refresh` is called."""
        for module, _ in self._found.values():
            attachment.restore(module, "forward")

    def refresh(self, attachment: Attachment) -> None:
        """Replace the forward of modules that are new, and give those that are gone their own back."""
        present: dict[int, tuple[str, nn.Module]] = {}
        factors: set[int] = set()
        for name, module in self._base.named_modules():
            if isinstance(module, LoraLayer):
                factors.update(id(factor) for factor in (*module.lora_A.modules(), *module.lora_B.modules()))
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or (
                self._fast.products and id(module) not in factors and widens(module)
            ):
                present[id(module)] = name, module
        for key in self._found.keys() - present:
            attachment.restore(self._found.pop(key)[0], "forward")
        for key, (name, module) in present.items():
            if key not in self._found:
                self._found[key] = module, self._replacement(name, module)
            if vars(module).get("forward") is not self._found[key][1]:
                attachment.replace(module, "forward", self._found[key][1])
        self.gated = {key: new for key, (_, new) in self._found.items() if isinstance(new, GatedLayer)}

    @property
    def run_alike(self) -> bool:
        """Whether all layers of adapters run by the backend alone, and see the tokens of a pass in their order."""
        return all(
            isinstance(new, WideLinear)
            or (isinstance(new, GatedLayer) and not new.run_by_peft and new.sees_tokens_in_order)
            for _, new in self._found.values()
        )

    def asked(self) -> set[Asked]:
        """Return what PEFT would run in the layers of its adapters."""
        layers = (new.peft if isinstance(new, GatedLayer) else new for _, new in self._found.values())
        return {
            layer.asked()
            for layer in layers
            if isinstance(layer, PeftLayer) and isinstance(layer.module, BaseTunerLayer)
        }

    def _replacement(self, name: str, module: nn.Module) -> GatedLayer | PeftLayer | WideLinear:
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            assert isinstance(module, nn.Linear)  # checked by `widens`
            return WideLinear(self._owner, module, self._fast.kernels)
        peft = PeftLayer(self._owner, module, _PARAMETERS if isinstance(module, ParamWrapper) else self._turn)
        if isinstance(module, LoraLayer) and not isinstance(module, NOT_LINEAR):
            return GatedLayer(self._owner, name, peft, module.base_layer, self._traits.sees_tokens(name))
        return peft
