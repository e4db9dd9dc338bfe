"""Tiny base models, and the one list of LoRA adapters that the tests run over."""

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

from architectures import ARCHITECTURES, IMAGES, PAD, VOCABULARY
from chunkwise_lora.engines.transformers import FastPaths

FAST = {"all fast paths": FastPaths(), "no fast path": FastPaths(kernels=False, attention=False, products=False)}

TYPICAL = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon_alibi",
    "opt",
    "bloom",
    "qwen3_moe",
)
"""The architectures of tests that go into depth. Of all others, `test_architectures` tests the essentials."""

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LANGUAGE_MODEL = r".*\.(language_model|text_model)\.layers\..*_proj"
_NO_OUTPUT = ["in_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
"""Linear layers beside the outputs of Mamba's layers, which PEFT cannot adapt in some models."""

TARGETS: dict[str, Any] = {
    "qwen3_moe": _ATTENTION,
    "llama4": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"],
    "phimoe": _ATTENTION,
    **dict.fromkeys(("mamba", "mamba2", "falcon_h1", "nemotron_h"), _NO_OUTPUT),
    **dict.fromkeys(IMAGES, _LANGUAGE_MODEL),
}
"""Target modules for architectures in which tests do not adapt all linear layers, or PEFT cannot."""

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
    kind = t.AutoModelForImageTextToText if architecture in IMAGES else t.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        if architecture in IMAGES:  # whose projection may be zero at first
            language = set(model.get_decoder().parameters())
            for parameter in model.parameters():
                parameter.data += 0 if parameter in language else 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model.eval()


@cache
def adapter(architecture: str, kind: str = "plain", seed: int = 1, targets: str | None = None) -> Path:
    """The folder of a PEFT adapter with random weights, which are large enough to change the generated tokens.

    Its target modules are `targets` if they are given, then those of `TARGETS`, then all linear layers.
    """
    options = {
        "r": 8,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "target_modules": targets or TARGETS.get(architecture, "all-linear"),
        **ADAPTERS[kind],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(build(architecture), LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (".lora_B." in name and kind == "orthogonal"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    folder = _scratch() / "-".join((architecture, kind, str(seed), *([targets] if targets else [])))
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
