"""A generation by one method that is timed step by step."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.benchmark.methods import BASE, Method, cache_for
from chunkwise_lora.calibration.work import now
from chunkwise_lora.engines.transformers.runner import LONG_PROMPT, PREFILL_TOKENS
from chunkwise_lora.engines.transformers.versions import CACHE


class Run:
    """A method's greedy generation from one batch of prompts. Each call of `decode` continues it.

    Args:
        method: The method that generates.
        prompt: (batch, tokens) token ids.
        length: Tokens that the cache must have room for, prompt and generated tokens together.
    """

    def __init__(self, method: Method, prompt: Tensor, length: int) -> None:
        self.method = method
        self._stack = ExitStack()
        self._model = method.model
        batch, self._columns = prompt.shape
        names = list(islice(cycle(method.adapters), batch)) or None
        self._call = None
        if method.chunkwise is not None:
            self._call = self._stack.enter_context(
                method.chunkwise.stream(
                    batch=batch,
                    prompt_columns=self._columns,
                    adapter_names=names,
                    chunkwise_config=method.config,
                )
            )
            self.cache: Any = self._call.cache
        else:
            self.cache = cache_for(method.name, self._model, length)
            if names is not None and method.name != BASE:
                # PEFT's `generate` does this once per call.
                self._stack.enter_context(self._model._enable_peft_forward_hooks(adapter_names=names))
        cut = self._call is not None and self._call.session.acts and prompt.shape[1] > LONG_PROMPT
        self._pieces = prompt.split(PREFILL_TOKENS if cut else prompt.shape[1], dim=1)
        self._next = prompt[:, -1:]

    def close(self) -> None:
        """End the generation, so that the model can run another one."""
        self._stack.close()

    def prefill(self) -> float:
        """Run the prompts through the model; returns the time in ms for the whole batch."""
        start = now(self._next.device)
        for piece in self._pieces:
            self._pass(piece)
        return (now(self._next.device) - start) * 1e3

    def fill(self) -> None:
        """Fill a baseline's cache with random keys and values. This takes less time than running the prompts."""
        config = self._model.config.get_text_config()
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            shape = (len(self._next), heads, self._columns, width)
            states = torch.randn(shape, device=self._next.device).to(self._model.dtype)
            positions = torch.arange(self._columns, device=self._next.device)
            self.cache.update(states, states, layer, {"cache_position": positions})

    def decode(self, steps: int) -> float:
        """Generate `steps` more tokens per sequence; returns the time in ms per step."""
        start = now(self._next.device)
        for _ in range(steps):
            self._pass(self._next)
        return (now(self._next.device) - start) * 1e3 / steps

    def _pass(self, tokens: Tensor) -> None:
        output = self._model(input_ids=tokens, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)

    @property
    def kv_bytes(self) -> int:
        """Bytes of storage that the cache's tensors hold."""
        if self._call is not None:
            return self.cache.nbytes
        tensors = (tensor for layer in self.cache.layers for tensor in vars(layer).values())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))

    @property
    def kv_bytes_in_use(self) -> int:
        """Bytes of the cache without room for later tokens."""
        return self.kv_bytes if self._call is None else self._call.trace().kv_bytes

    @property
    def adapter_bytes(self) -> float:
        """Bytes of adapter weights read per forward pass, averaged over the passes so far."""
        if self._call is None:
            return float(self.method.adapter_bytes)
        trace = self._call.trace()
        return trace.adapter_bytes_read / trace.passes

    @property
    def scheduler_seconds(self) -> float:
        """Seconds spent on planning so far; 0 for a baseline."""
        return 0.0 if self._call is None else self._call.trace().scheduler_seconds
