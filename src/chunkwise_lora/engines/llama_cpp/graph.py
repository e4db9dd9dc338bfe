"""Runs adapters inside the graphs of one llama.cpp context, by the plan of each pass."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from chunkwise_lora.engines.llama_cpp.adapters import LoadedAdapter, shapes_of
from chunkwise_lora.engines.llama_cpp.kernels import functions, refusal
from chunkwise_lora.engines.llama_cpp.structs import ELEMENTS, Factors, Module, Pass
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import PassPlan, highest_rungs


class Graph:
    """The adapters and the running pass, as the C kernels read them.

    Args:
        element: Element type of the factors.
    """

    notes: tuple[str, ...] = ()
    """What it does not carry out."""

    def __init__(self, element: str) -> None:
        self._functions = functions()
        self._pass = Pass(element=ELEMENTS[element])
        self._places: dict[str, int] = {}
        """The place of each adapter among a module's factors, by its key."""
        self._owners: list[Any] = []
        """What the structures of the installed adapters point to."""
        self._tokens: Any = ()
        self._plan: PassPlan | None = None
        self._has_failed = False

    def observe(self, context_params: Any) -> None:
        """Let a context that is made with these parameters call us for every node of its graphs."""
        from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback

        context_params.cb_eval = ctypes.cast(self._functions.observe, ggml_backend_sched_eval_callback)
        context_params.cb_eval_user_data = ctypes.addressof(self._pass)

    def reserve(self, rows: int, graph_rows: int, threads: int, head_numbers: int) -> None:
        """Make room for passes.

        Args:
            rows: Largest number of tokens of a pass.
            graph_rows: Largest number of tokens of a graph. llama.cpp cuts a pass into graphs.
            threads: Largest number of threads.
            head_numbers: Query heads, times two more than their width.
        """
        self._adapters, self._tops = np.empty(rows, np.int32), np.empty(rows, np.int32)
        self._graph_rows = graph_rows
        self._outputs = np.empty(graph_rows, np.int32)
        self._pass.outputs, self._pass.room = self._outputs.ctypes.data, graph_rows
        self._partials = np.empty((threads, head_numbers), np.float32)
        self._pass.partials = self._partials.ctypes.data
        self._pass.threads, self._pass.head_numbers = threads, head_numbers

    def install(self, adapters: Mapping[str, LoadedAdapter]) -> None:
        """Run with these adapters from the next pass on. llama.cpp must build a new graph for them."""
        rungs = max((adapter.rungs for adapter in adapters.values()), default=1)
        rank = max((adapter.rank for adapter in adapters.values()), default=1)
        absent = np.zeros(rungs, np.int32)
        shapes = shapes_of(adapters)
        modules = (Module * len(shapes))()
        owners: list[Any] = [absent, modules, list(adapters.values())]
        for module, (tensor, (outputs, inputs)) in zip(modules, shapes.items(), strict=True):
            factors = (Factors * len(adapters))(
                *(
                    adapter.modules[tensor].struct if tensor in adapter.modules else Factors(ranks=absent.ctypes.data)
                    for adapter in adapters.values()
                )
            )
            module.running, module.name = ctypes.pointer(self._pass), tensor.encode()
            module.inputs, module.outputs, module.factors = inputs, outputs, factors
            owners.append(factors)
        self._z = np.empty((self._graph_rows, rank), np.float32)
        self._weights = np.zeros((len(self._tops), rungs), np.float32)
        self._places = {adapter.info.key: place for place, adapter in enumerate(adapters.values())}
        self._owners, self._plan, self._has_failed = owners, None, False
        run = self._pass
        run.modules, run.module_count = ctypes.addressof(modules), len(modules)
        run.rungs, run.rank, run.z = rungs, rank, self._z.ctypes.data
        run.adapters, run.tops = self._adapters.ctypes.data, self._tops.ctypes.data

    @property
    def attentions(self) -> int:
        """Number of attention nodes of the last pass that ran in our kernel."""
        return int(self._pass.attentions)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let llama.cpp run its own LoRA within this block, in graphs that it builds for it."""
        self._pass.is_off = 1
        try:
            yield
        finally:
            self._pass.is_off = 0

    def begin(self, tokens: Sequence[int], plan: PassPlan) -> None:
        """Prepare a pass over `tokens` (n,).

        Raises:
            EngineError: An earlier pass failed, so that llama.cpp's graph may be half changed.
        """
        if self._has_failed:
            raise EngineError("this model has failed before; load it again")
        run = self._pass
        self._tokens = (ctypes.c_int32 * len(tokens))(*tokens)
        run.tokens, run.rows = ctypes.addressof(self._tokens), len(tokens)
        run.first_row = run.graph_rows = run.graphs = run.patterns = run.attentions = run.error = 0
        if plan is not self._plan:
            self._set_rows(plan)
            self._plan = plan

    def _set_rows(self, plan: PassPlan) -> None:
        count = plan.tokens
        self._adapters[:count] = -1
        self._tops[:count] = 0
        is_gated = any(segment.weights is not None for segment in plan.segments)
        self._pass.weights = self._weights.ctypes.data if is_gated else None
        for segment in plan.segments:
            rows: Any = slice(0, count) if segment.rows is None else segment.rows
            self._adapters[rows] = self._places[segment.adapter]
            self._tops[rows] = segment.rung if segment.weights is None else highest_rungs(segment.weights)
            if segment.weights is not None:
                self._weights[rows, : segment.weights.shape[1]] = segment.weights
            elif is_gated:
                self._weights[rows] = 0
                self._weights[rows, segment.rung] = 1

    def finish(self) -> None:
        """Check that llama.cpp ran the pass as it was planned, with every module's adapter in our kernels.

        Raises:
            EngineError: It did not.
        """
        run = self._pass
        run.rows = 0
        if run.error:
            self._has_failed = True
            raise refusal(run.error, run.where)
        if not run.graphs or run.patterns != run.graphs * run.module_count:
            self._has_failed = True
            raise EngineError(
                f"llama.cpp's graph used {run.patterns} of {run.graphs * run.module_count} adapted modules; this model "
                "cannot run with these adapters"
            )

    def entropy(self, logits: Any, count: int) -> float:
        """Return the entropy in nats of the distribution of `count` logits at an address."""
        return float(self._functions.entropy(ctypes.cast(logits, ctypes.c_void_p), count))
