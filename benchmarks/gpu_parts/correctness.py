"""Every path that a GPU takes, on tiny models, against the gate form, plain attention and PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel
from chunkwise_lora.benchmark.shapes import random_adapter, random_model
from chunkwise_lora.engines.transformers import FastPaths
from chunkwise_lora.method.config import ComplexityConfig
from gpu_parts.cells import Cell, Settings
from gpu_parts.timing import relative_error

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=500,
    initializer_range=0.05,
    eos_token_id=None,
)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative errors; those of float32 need products in float32, which `measure` sets."""


def cells(settings: Settings) -> Iterator[Cell]:
    """Yield one cell per path."""
    dtypes = [torch.float32] if settings.tiny else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for tokens in (3, 20) if settings.tiny else (1, 3, 64, 300, 1000):
            yield _cell(f"kernels, {tokens} tokens", dtype, partial(kernels, settings, dtype, tokens))
        yield _cell("generate, lossless, of PEFT", dtype, partial(lossless, settings, dtype))
        for preset in ("lossless", "balanced", "compact"):
            run = partial(fast_and_slow, settings, dtype, preset)
            yield _cell(f"generate, {preset}, of PyTorch alone", dtype, run)


def _cell(name: str, dtype: torch.dtype, compare: Any) -> Cell:
    return Cell(f"{name}, {str(dtype).removeprefix('torch.')}", partial(measure, dtype, compare))


def measure(dtype: torch.dtype, compare: Any) -> dict[str, Any]:
    """Return the relative error of a path, and whether it is within rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            error = compare()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"error": error, "tolerance": TOLERANCES[dtype], "right": error <= TOLERANCES[dtype]}


def kernels(settings: Settings, dtype: torch.dtype, tokens: int) -> float:
    """Compare the adapter kernels with the gate form in float64: ranks, rungs, cross-fades, scales, and no adapter."""
    from chunkwise_lora.backends.triton.schedule import Schedule
    from chunkwise_lora.backends.triton.table import AdapterTable, Directions

    device, inputs, widths = settings.device, 320, (128, 48)
    ranks = ((0, 5, 16), (3, 64, 64), (1, 20, 100))

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    adapters = [
        [Directions(normal(of_rungs[-1], inputs), normal(width, of_rungs[-1]), of_rungs) for width in widths]
        for of_rungs in ranks
    ]
    table = AdapterTable.of(adapters, device=device, dtype=dtype)
    rng = np.random.default_rng(tokens)
    slots = rng.integers(-1, len(adapters), tokens)
    weights = np.eye(3, dtype=np.float32)[rng.integers(0, 3, tokens)]
    weights[::3] = rng.random((len(weights[::3]), 3)) - 0.5
    schedule = Schedule(tokens, len(adapters), 3, device)
    schedule.update(slots, weights)
    x, y = normal(tokens, inputs), normal(tokens, sum(widths))
    exact = y.double()
    for token, slot in enumerate(slots.tolist()):
        offset = 0
        for part in adapters[slot] if slot >= 0 else ():
            rungs = torch.tensor(part.ranks)[:, None] > torch.arange(len(part.down))
            gates = (torch.from_numpy(weights[token]).double() @ rungs.double()).to(device)
            added = part.up.double() @ (gates * (part.down.double() @ x[token].double()))
            exact[token, offset : offset + len(part.up)] += added
            offset += len(part.up)
    table.add(y, x, schedule)
    return relative_error(y, exact)


def lossless(settings: Settings, dtype: torch.dtype) -> float:
    """Compare the logits of a generation with PEFT's."""
    base, folders = _model(settings, dtype)
    peft = PeftModel.from_pretrained(base, str(folders["a"]), autocast_adapter_dtype=False).eval().to(dtype)
    inputs = _prompts(settings, 1)
    text, expected = _logits(peft, inputs, None)
    model = ChunkWiseModel(peft, config=ChunkWiseConfig.preset("lossless"))
    return relative_error(_logits(model, inputs, text)[1], expected)


def fast_and_slow(settings: Settings, dtype: torch.dtype, preset: str) -> float:
    """Compare the logits of a mixed, padded batch with those that PyTorch alone computes by the same plan."""
    base, folders = _model(settings, dtype)
    inputs, names = _prompts(settings, 4), ["a", "b", "__base__", "a"]
    config = ChunkWiseConfig.preset(preset)
    if config.reads_entropy:  # whose rounding could change the plan
        config = config.model_copy(update={"complexity": ComplexityConfig(entropy=0.0)})
    slow = FastPaths(kernels=False, products=False)
    with ChunkWiseModel(base, folders, config, slow) as model:
        text, expected = _logits(model, inputs, None, adapter_names=names)
    with ChunkWiseModel(base, folders, config) as model:
        return relative_error(_logits(model, inputs, text, adapter_names=names)[1], expected)


def _model(settings: Settings, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Path]]:
    folders = {
        name: random_adapter(CONFIG, rank, settings.scratch / name, seed)
        for seed, (name, rank) in enumerate({"a": 16, "b": 40}.items(), 1)
    }
    return random_model(CONFIG, dtype, settings.device), folders


def _prompts(settings: Settings, batch: int) -> dict[str, Tensor]:
    """Return random prompts of different lengths, padded on the left."""
    columns = 24 if settings.tiny else 200
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, CONFIG.vocab_size, (batch, columns), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * columns // 8] = 0
    return {"input_ids": (ids * mask).to(settings.device), "attention_mask": mask.to(settings.device)}


def _logits(model: Any, inputs: dict[str, Tensor], text: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens (batch, new) and logits (batch, new, vocabulary) of a greedy generation.

    Args:
        model: What generates.
        inputs: The prompts.
        text: (batch, new) the tokens to follow instead, so that a near tie does not lead to another text.
        options: Further options of `generate`.
    """
    width, steps = inputs["input_ids"].shape[1], 12 if width_is_tiny(inputs) else 80

    def follow(ids: Tensor, scores: Tensor) -> Tensor:
        if text is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, text[:, ids.shape[1] - width, None], 0.0)

    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        logits_processor=[follow],
        **options,
    )
    return output.sequences[:, width:], torch.stack(output.logits, dim=1)


def width_is_tiny(inputs: dict[str, Tensor]) -> bool:
    """Return whether prompts are those of the tiny form."""
    return inputs["input_ids"].shape[1] < 100


def table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| | relative error | at most | |", "|---|---:|---:|---|"]
    return lines + [
        f"| {cell} | {one['error']:.1e} | {one['tolerance']:.0e} | {'right' if one['right'] else '**wrong**'} |"
        for cell, one in measured.items()
    ]
