"""A check at load that our kernels compute what llama.cpp's own LoRA computes, for architectures without a test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llama_cpp import llama_cpp

from chunkwise_lora.engines.base import adapter_info
from chunkwise_lora.engines.llama_cpp.adapters import LoadedAdapter, ModuleFactors
from chunkwise_lora.engines.llama_cpp.carrier import Carrier
from chunkwise_lora.engines.llama_cpp.graph import Graph
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule, RankLadder
from chunkwise_lora.method.segments import PassPlan, Segment

TESTED = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
"""Architectures, as GGUF files name them, for which tests compare the logits with PEFT."""
TOKENS = (0, 1, 2)
"""What the check runs."""
STRENGTH = 0.1
"""Size of what the check's adapter adds to a module's outputs, for inputs of size 1."""
TOLERANCE = 0.1
"""Largest difference, relative to the adapter's effect. A quantised model rounds the activations of each run anew."""


def check_kernels(llm: Any, graph: Graph, carrier: Carrier, adapter: LoadedAdapter) -> None:
    """Compare a random adapter of rank 1 in our kernels with the same in llama.cpp's own LoRA, on a few tokens.

    Args:
        llm: The `llama_cpp.Llama`. The check clears its context.
        graph: Runs the adapters. The check leaves none installed.
        carrier: Sets llama.cpp's adapter. The check leaves none set.
        adapter: The check uses the modules of this adapter.

    Raises:
        EngineError: The results differ.
    """
    random = _rank_1(adapter)
    carrier.cover(llm.metadata["general.architecture"], random.shapes, random.ladder.modules)
    graph.install({"": random})
    plan = PassPlan((Segment("", 1),), 1, len(TOKENS))
    with graph.off():
        own = _logits(llm)
    graph.begin(TOKENS, plan)
    ours = _logits(llm)
    graph.finish()
    graph.install({})
    carrier.use(None)
    graph.begin(TOKENS, PassPlan((), 1, len(TOKENS)))
    effect = np.abs(own - _logits(llm)).max()
    if not np.abs(ours - own).max() <= TOLERANCE * effect:
        raise EngineError(
            f"{llm.model_path}: for architecture '{llm.metadata['general.architecture']}', our kernels do not compute "
            "what llama.cpp's own LoRA computes, so adapters cannot run with this model"
        )


def _rank_1(adapter: LoadedAdapter) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for tensor, (outputs, inputs) in adapter.shapes.items():
        up = STRENGTH * torch.randn(outputs, 1, generator=generator)
        down = torch.randn(1, inputs, generator=generator) / inputs**0.5
        modules[tensor] = LadderModule(up.half().float(), down.half().float(), torch.ones(1), (0, 1))
    ladder = RankLadder(modules, None, "svd", {})
    factors = {tensor: ModuleFactors.of(tensor, module, adapter.element) for tensor, module in modules.items()}
    return LoadedAdapter(ladder, adapter_info("", ladder, 4), factors, adapter.shapes, adapter.element)


def _logits(llm: Any) -> np.ndarray:
    """Return (vocabulary,) logits behind `TOKENS`."""
    llm._ctx.kv_cache_clear()
    llm._batch.set_batch(list(TOKENS), n_past=0, logits_all=False)
    type(llm._ctx).decode(llm._ctx, llm._batch)  # not planned
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()
    llm._ctx.kv_cache_clear()
    return logits
