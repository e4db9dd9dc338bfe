"""Adds the adapter product of a forward pass to the output of vLLM's LoRA layers, which call this module.

vLLM's layers still compute the base product and communicate between tensor-parallel ranks. The adapter product is
computed in a custom operator, so that a compiled model does not contain the plan of one pass.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.utils.torch_utils import direct_register_custom_op

from chunkwise_lora.backends import AnyBackend, Layer, PreparedPass
from chunkwise_lora.backends.torch_products import TorchBackend, TorchPass
from chunkwise_lora.method.segments import PassPlan


class RunningPass:
    """The forward pass that a worker runs. No adapter runs until the pass is planned."""

    def __init__(self, backend: AnyBackend) -> None:
        self.backend = backend
        self.embeddings = TorchBackend(backend.device, backend.dtype)
        """Holds what adapters add to token embeddings."""
        self.tokens = 0
        """Tokens of the pass, without padding."""
        self.samples = False
        """Whether logits are computed of the last token of each request, and not of the tokens of a prompt."""
        self._prepared: PreparedPass | None = None
        self._embedded: TorchPass | None = None
        self._plan: PassPlan | None = None
        self._last: np.ndarray = np.empty(0, np.int64)
        """(requests,) positions of the last token of each request in the pass."""

    def begin(self, tokens: int) -> None:
        """Start a pass over `tokens` tokens, padding not counted."""
        self.tokens, self._prepared, self._embedded, self._plan = tokens, None, None, None

    def plan(self, plan: PassPlan, last: np.ndarray) -> None:
        """Set the plan that all layers follow in this pass. `last` (requests,) are the positions of each request's last
        token, of which logits are computed."""
        self._prepared = self._embedded = None
        if not self.embeddings.adapters.isdisjoint(plan.adapters):
            self._embedded = self.embeddings.prepare(plan)
        self._plan, self._last = plan, last

    def add(self, layer: Layer, y: Tensor, x: Tensor) -> None:
        """Add the adapter product for x (tokens, in) to y (tokens, width), in place. Rows after the pass's tokens are
        padding and do not change."""
        if self._plan is None or not self._plan.segments:
            return
        if self._prepared is None:
            self._prepared = self.backend.prepare(self._plan)
        if len(x) > self.tokens:
            y, x = y[: self.tokens], x[: self.tokens]
        self.backend.apply(layer, y, x, self._prepared)

    def add_to_embeddings(self, layer: Layer, y: Tensor, ids: Tensor) -> None:
        """Add the adapter product to the embeddings y (tokens, width) of the token ids (tokens,), in place.

        An embedding is a product with the one-hot vector of a token, so `down x` is a column of `down`.
        """
        if self._embedded is None:
            return
        y, ids = y[: self.tokens], ids[: self.tokens]
        for segment in self._embedded.segments:
            of_segment = ids if segment.rows is None else ids[segment.rows]
            for factors in segment.adapter.get(layer.name, ()):
                down, up = factors.slices[segment.rung]
                hidden, gates = down[:, of_segment].T, segment.gates(factors)
                if gates is not None:
                    hidden = (hidden * gates).to(up.dtype)
                added = (hidden @ up).to(y.dtype)
                if segment.rows is None:
                    y += added
                else:
                    y.index_add_(0, segment.rows, added)

    def add_to_logits(self, layer: Layer, y: Tensor, x: Tensor, adapters: Container[str]) -> None:
        """Add the product of those of `adapters` that run in this pass to logits y (requests, vocabulary), in place."""
        if self.samples and self._plan is not None and any(one in adapters for one in self._plan.adapters):
            self.backend.apply(layer, y, x, self.backend.prepare(self._plan.at(self._last)))

    def requests_of(self, adapters: Container[str]) -> dict[int, str]:
        """Return the requests of the pass that run with one of `adapters`: its key, by the request's place."""
        if self._plan is None or not any(one in adapters for one in self._plan.adapters):
            return {}
        count = len(self._last)
        return {
            int(place): segment.adapter
            for segment in self._plan.at(self._last).segments
            if segment.adapter in adapters
            for place in (range(count) if segment.rows is None else segment.rows)
        }


class LayerAdapters:
    """All adapters of one layer. It takes the place of the punica wrapper of vLLM's layers."""

    def __init__(self, layer: Layer, running: RunningPass) -> None:
        self.layer = layer
        self.key = f"{layer.name}.chunkwise"
        """Key of this object in vLLM's forward context."""
        self._running = running

    def add_lora_linear(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Add the adapter product for x (tokens, in) to y (tokens, width), in place, and return y. vLLM calls this."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.chunkwise_add_adapters(y, x, self.key)
        else:
            self.add(y, x)
        return y

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the adapter product by the plan of the running pass."""
        self._running.add(self.layer, y, x)


class EmbeddingAdapters:
    """All adapters of a token embedding."""

    def __init__(self, layer: Layer, running: RunningPass) -> None:
        self.layer = layer
        self.key = f"{layer.name}.chunkwise"
        """Key of this object in vLLM's forward context."""
        self._running = running

    def add(self, y: Tensor, ids: Tensor) -> None:
        """Add to the embeddings y (tokens, width) of the token ids (tokens,), by the plan of the running pass."""
        self._running.add_to_embeddings(self.layer, y, ids)


class EmbeddingWithLadders(VocabParallelEmbeddingWithLoRA):
    """A token embedding of vLLM, with adapters."""

    def __init__(self, base_layer: nn.Module, adapters: EmbeddingAdapters) -> None:
        super().__init__(base_layer)
        self._adapters = adapters

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (tokens, width) of token ids x (tokens,)."""
        y = self.base_layer.forward(x)
        if torch.compiler.is_compiling():
            torch.ops.vllm.chunkwise_add_adapters(y, x, self._adapters.key)
        else:
            self._adapters.add(y, x)
        return y


class HeadAdapters:
    """All adapters of the output head. It takes the place of the punica wrapper of vLLM's logits processor."""

    def __init__(self, layer: Layer, running: RunningPass, adapters: Container[str]) -> None:
        self.layer = layer
        self._running = running
        self._adapters = adapters
        """Keys of the loaded adapters that adapt the head."""

    def add_lora_logits(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Add the adapter product for x (requests, in) to logits y (requests, vocabulary), in place, and return y."""
        self._running.add_to_logits(self.layer, y, x, self._adapters)
        return y


class Head(NamedTuple):
    """The head of a classifier that an adapter brings."""

    weight: Tensor
    """(labels, in)"""
    bias: Tensor | None
    """(labels,)"""


class ClassifierWithLadders(nn.Module):
    """The head of a classifier, with adapters. It gets one row per request."""

    def __init__(self, base_layer: nn.Module, layer: Layer, running: RunningPass) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.adapters: set[str] = set()
        """Keys of the adapters that add to the logits."""
        self.heads: dict[str, Head] = {}
        """By key: the heads of the adapters that replace it."""
        self._running = running

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the logits (requests, labels) for x (requests, in), or a list of rows if their lengths differ."""
        logits = self.base_layer(x)
        logits = logits[0] if isinstance(logits, tuple) else logits
        self._running.add_to_logits(self.layer, logits, x, self.adapters)
        replaced = self._running.requests_of(self.heads)
        if not replaced:
            return logits
        rows = list(logits)
        for place, adapter in replaced.items():
            weight, bias = self.heads[adapter]
            rows[place] = nn.functional.linear(x[place].to(weight.dtype), weight, bias).to(logits.dtype)
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows


def _add_adapters(y: Tensor, x: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].add(y, x)


def _add_adapters_fake(y: Tensor, x: Tensor, layer: str) -> None:
    pass


if not hasattr(torch.ops.vllm, "chunkwise_add_adapters"):
    direct_register_custom_op(
        op_name="chunkwise_add_adapters",
        op_func=_add_adapters,
        mutates_args=["y"],
        fake_impl=_add_adapters_fake,
    )
