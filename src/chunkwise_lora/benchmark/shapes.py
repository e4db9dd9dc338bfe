"""Models with random weights in the shapes of known models, and random adapters for them.

A model takes the same time with random weights as with trained ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chunkwise_lora.ladder.peft_files import PREFIX


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=65_536,
        eos_token_id=None,
    )


SHAPES = {
    "135M": _llama(576, 30, 9, 3, 1536, 49_152, True),
    "360M": _llama(960, 32, 15, 5, 2560, 49_152, True),
    "1B": _llama(2048, 16, 32, 8, 8192, 128_256, True),
    "7B": _llama(4096, 32, 32, 32, 11_008, 32_000, False),
}
"""Shapes by number of parameters: SmolLM-135M, SmolLM-360M, Llama-3.2-1B and Llama-2-7B."""


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model with random weights, which are the same in every call. The global random state does not change."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_adapter(config: LlamaConfig, rank: int, folder: Path, seed: int = 1) -> Path:
    """Write a PEFT adapter with small random weights on all linear layers except the head; returns `folder`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            for side, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                factor = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{PREFIX}{name}.lora_{side}.weight"] = factor.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear").save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
