"""Complexity signals, one per file. The paper's four are registered here; `register_signal` adds others."""

from chunkwise_lora.method.signals.attention import AttentionProxy
from chunkwise_lora.method.signals.base import PAPER_SIGNALS, SIGNAL_REGISTRY, Signal, register_signal
from chunkwise_lora.method.signals.entropy import Entropy
from chunkwise_lora.method.signals.novelty import Novelty
from chunkwise_lora.method.signals.position import PositionalPrior

__all__ = [
    "PAPER_SIGNALS",
    "SIGNAL_REGISTRY",
    "AttentionProxy",
    "Entropy",
    "Novelty",
    "PositionalPrior",
    "Signal",
    "register_signal",
]
