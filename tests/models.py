"""The one list of tiny base models and the one list of LoRA adapters that the tests run over."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from chunkwise_lora.engines.transformers import FastPaths

VOCABULARY = 97
PAD = 0
FAST = {"all fast paths": FastPaths(), "no fast path": FastPaths(kernels=False, attention=False, products=False)}
SLIDING_WINDOW = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.18,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LLAMA_LIKE = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_HYBRID = ["sliding_attention", "full_attention"]
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}

ARCHITECTURES: dict[str, Callable[[], t.PreTrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**_LLAMA_LIKE),
    "mistral": lambda: t.MistralConfig(**_LLAMA_LIKE, sliding_window=SLIDING_WINDOW),
    "qwen2": lambda: t.Qwen2Config(**_LLAMA_LIKE),
    "qwen3": lambda: t.Qwen3Config(**_LLAMA_LIKE, head_dim=16),
    "gemma2": lambda: t.Gemma2Config(
        **_LLAMA_LIKE, head_dim=16, sliding_window=SLIDING_WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: t.Gemma3TextConfig(
        **_LLAMA_LIKE, head_dim=16, sliding_window=SLIDING_WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=16
    ),
    "phi": lambda: t.PhiConfig(**_LLAMA_LIKE, tie_word_embeddings=True),
    "phi3": lambda: t.Phi3Config(**_LLAMA_LIKE),
    "gpt2": lambda: t.GPT2Config(**_COMMON, n_positions=256),
    "gpt_neox": lambda: t.GPTNeoXConfig(**_COMMON, intermediate_size=48, max_position_embeddings=1024),
    "falcon": lambda: t.FalconConfig(**_COMMON, multi_query=True, parallel_attn=True, new_decoder_architecture=False),
    "falcon_alibi": lambda: t.FalconConfig(**_COMMON, multi_query=True, alibi=True),
    "opt": lambda: t.OPTConfig(
        **{k: v for k, v in _COMMON.items() if k != "initializer_range"},
        ffn_dim=48,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        init_std=0.18,
    ),
    "bloom": lambda: t.BloomConfig(**_COMMON, tie_word_embeddings=False),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**_LLAMA_LIKE, **_MOE, head_dim=16),
}
"""Configs of tiny models. The sliding windows of `mistral`, `gemma2` and `gemma3` are shorter than the tests' texts."""

TARGETS: dict[str, Any] = {"qwen3_moe": _ATTENTION}
"""Target modules for architectures in which "all-linear" would include routed experts."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r".*\.1\.mlp\.down_proj": 12},
        "alpha_pattern": {"v_proj": 40, r"layers\.0\.mlp\.gate_proj": 4},
    },
    "one_layer": {"layers_to_transform": [1], "target_modules": _ATTENTION},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "wide": {"r": 40},
    "lm_head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_mlp": {"modules_to_save": ["mlp"], "target_modules": _ATTENTION},
    "saved_embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied_embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
"""Changes to a LoRA of rank 8 on all linear layers. The rank of `wide` is larger than its modules have inputs."""


def build(architecture: str, **changes: Any) -> t.PreTrainedModel:
    """A model with random weights, which are the same in every call."""
    config = ARCHITECTURES[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return model.eval()


@cache
def adapter(architecture: str, kind: str = "plain", seed: int = 1) -> Path:
    """The folder of a PEFT adapter with random weights, which are large enough to change the generated tokens."""
    options = {
        "r": 8,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "target_modules": TARGETS.get(architecture, "all-linear"),
        **ADAPTERS[kind],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(build(architecture), LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (".lora_B." in name and kind == "orthogonal"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    folder = _scratch() / f"{architecture}-{kind}-{seed}"
    model.save_pretrained(str(folder))
    return folder


@cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="chunkwise-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def peft_model(architecture: str, kind: str = "plain", **changes: Any) -> PeftModel:
    """The reference for correct outputs: unmerged PEFT."""
    return PeftModel.from_pretrained(build(architecture, **changes), str(adapter(architecture, kind))).eval()


def prompts(lengths: tuple[int, ...] = (5, 11, 8), seed: int = 3) -> dict[str, Tensor]:
    """A batch of random prompts, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, Tensor], new_tokens: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Generate greedily; returns the new tokens (batch, new) and their logits (batch, new, vocabulary)."""
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    width = inputs["input_ids"].shape[1]
    return output.sequences[:, width:], torch.stack(output.logits, dim=1)


@contextmanager
def linear_outputs_plus(
    model: t.PreTrainedModel, addition: Callable[[str, Tensor], Tensor], names: Iterable[str]
) -> Iterator[None]:
    """Add `addition(name, x)` to the outputs of the named linear modules by hooks, with x (batch, tokens, in)."""

    def hook_of(name: str) -> Callable[..., Tensor]:
        return lambda module, args, output: output + addition(name, args[0])

    hooks = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
