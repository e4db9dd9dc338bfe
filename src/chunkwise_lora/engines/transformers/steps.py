"""Decode steps whose whole forward pass is captured once, as a CUDA graph, and then replayed.

What changes from step to step lies in tensors that are filled before each replay: token ids, positions, the adapters'
schedule, where the cache lies and which of its slots are in use. So one graph serves every call of the same batch size,
whatever its adapters, plan and cache are. Planning and KV decisions stay outside of it.

The first step of a kind runs the same code without a graph. The second step is captured. The third one runs both ways,
and the graph is given up if they differ: a model may hide a number of the step in its Python code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chunkwise_lora.backends.triton import attention_on
from chunkwise_lora.engines.base import entropies_of
from chunkwise_lora.engines.transformers.cache.stepping import StepRefused, StepTables
from chunkwise_lora.engines.transformers.calls import Call
from chunkwise_lora.engines.transformers.context import PASS, ForwardPass, within
from chunkwise_lora.engines.transformers.session import Session, SessionCache
from chunkwise_lora.engines.transformers.unchanged import Unchanged
from chunkwise_lora.errors import first_line
from chunkwise_lora.method.segments import PassPlan

if TYPE_CHECKING:
    from chunkwise_lora.backends.triton.backend import TritonBackend

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
Replay = Callable[[], object]

FILLED = ("input_ids", "attention_mask", "position_ids", "cache_position")
"""Inputs of a step that its tensors stand for."""

PASSED: Mapping[str, tuple[int, ...]] = {"use_cache": (True,), "return_dict": (True,), "logits_to_keep": (0, 1)}
"""Values of the other inputs that steps may have; of those that are not named here, False."""

MOST_KINDS = 8
"""Kinds of steps whose graphs are kept."""

SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference between a replayed step and the same step without a graph, relative to the norm of the logits."""


def record(run: Callable[[], object], device: torch.device) -> Replay:
    """Capture what `run` launches on a GPU, and return what replays it. Nothing is computed meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


@dataclass(frozen=True)
class Kind:
    """What steps that share a graph have in common."""

    batch: int
    layers: int
    """Layers of the cache."""
    dtype: torch.dtype
    """Dtype of the cache."""
    layout: int
    """The layout of the backend's tables; 0 if no adapter runs."""
    reads_entropy: bool
    others: tuple[tuple[str, object], ...]
    """The other inputs of the model."""


Results = tuple[Tensor, Tensor | None]
"""Logits (batch, 1, vocabulary), and their entropies (batch,) float32 if the plan reads them."""


class Step:
    """The tensors of a step, and its graph once it is captured. One call uses it at a time.

    Args:
        kind: What its steps have in common.
        tables: Where the cache lies.
        backend: Runs the adapters.
    """

    def __init__(self, kind: Kind, tables: StepTables, backend: TritonBackend) -> None:
        self.kind = kind
        self.tables = tables
        self.fixed = backend.fixed_pass(kind.batch) if kind.layout else None
        """The pass of the adapters; None if no adapter runs."""
        self.of_model: Unchanged | None = None
        """The model as it was when the step was made."""
        self.calls = 0
        self.replay: Replay | None = None
        self.is_checked = False
        """Whether a replay was compared with the step without a graph."""
        self.captured: Results
        """What a replay computes."""
        self.output: type[Any]
        """What kind of output the model returns."""
        self._ids, self._positions = torch.zeros(2, kind.batch, 1, dtype=torch.long, device=backend.device)
        self._backend = backend
        self._ended = torch.cuda.Event() if backend.device.type == "cuda" else None

    def begin(self) -> None:
        """Wait, on the device, until the step's last use has ended, which another stream may have queued."""
        if self._ended is not None:
            torch.cuda.current_stream(self._backend.device).wait_event(self._ended)

    def end(self) -> None:
        """Let the next use begin after all that is queued now."""
        if self._ended is not None:
            self._ended.record(torch.cuda.current_stream(self._backend.device))

    def fill(self, inputs: Mapping[str, Any], position: int, plan: PassPlan) -> None:
        """Take the tokens, positions and plan of a pass.

        Args:
            inputs: The model's keyword arguments.
            position: The position of the tokens, if the inputs do not name it.
            plan: The plan of the pass.
        """
        self._ids.copy_(inputs["input_ids"])
        positions = inputs.get("position_ids")
        if positions is None:
            self._positions.fill_(position)
        else:
            self._positions.copy_(positions)
        if self.fixed is not None:
            self._backend.refill(self.fixed, plan)

    def compute(self, forward: Forward, cache_name: str, cache: SessionCache, running: ForwardPass) -> Results:
        """Run the model on the step's tensors.

        Raises:
            StepRefused: The model does not run like this.
        """
        inputs = dict(self.kind.others) | {"input_ids": self._ids, "position_ids": self._positions, cache_name: cache}
        with cache.by_tables(self.tables), within(PASS, replace(running, fixed=self.fixed)):
            output = forward(**inputs, attention_mask=self.tables.mask)
        kept = {name for name, value in output.items() if value is not None} if isinstance(output, Mapping) else set()
        if "logits" not in kept or not kept <= {"logits", cache_name}:
            raise StepRefused(f"the model returns {', '.join(sorted(kept)) or type(output).__name__}")
        self.output, logits = type(output), output["logits"]
        return logits, entropies_of(logits[:, -1]) if self.kind.reads_entropy else None


class DecodeSteps:
    """Runs the decode steps of one model as graphs, where the model and the call allow it.

    Args:
        model: The model.
        enabled: Whether any step may.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        self._model = model
        self._enabled = enabled
        self._unchanged: Unchanged | None = None
        """The model as it was when the first graph was captured."""
        self._unused: dict[Kind, list[Step]] = {}
        self._lock = Lock()

    def stop(self, why: str) -> None:
        """Run no more steps in this way."""
        self._enabled = False
        self._unused = {}
        logger.warning("decode steps of this model run without CUDA graphs: %s", why)

    def fit(self, inputs: Mapping[str, Any], session: Session, cache: SessionCache | None) -> bool:
        """Return whether a pass may run as a step, as far as its inputs and its cache tell."""
        tokens, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if not self._enabled or cache is None or not session.columns or tokens is None or tokens.shape[1] != 1:
            return False
        simple = all(
            name in FILLED
            or value is None
            or value is cache
            or (isinstance(value, (bool, int)) and value in PASSED.get(name, (False,)))
            for name, value in inputs.items()
        )
        simple &= (positions is None or positions.ndim == 2) and not torch.is_autocast_enabled(tokens.device.type)
        return simple and cache.can_step and self._is_captured_right()

    def _is_captured_right(self) -> bool:
        """Drop the graphs if the model has changed. Return whether graphs can stand for it."""
        with self._lock:
            if self._unchanged is None or not self._unchanged:
                self._unchanged, self._unused = Unchanged(self._model), {}
            return not self._unchanged.has_hooks

    def run(
        self,
        forward: Forward,
        inputs: Mapping[str, Any],
        call: Call,
        running: ForwardPass,
        backend: TritonBackend,
    ) -> tuple[Any, Tensor | None] | None:
        """Run a planned pass as a step.

        Args:
            forward: The model's own forward.
            inputs: Its keyword arguments.
            call: The call, with a cache.
            running: The pass.
            backend: Runs the adapters.

        Returns:
            The model's output, and the entropies (batch,) of its logits, if the plan reads them. None if the pass must
            run in the usual way; all is then as before.
        """
        cache, cache_name = call.cache, str(call.takes_cache_as)
        assert cache is not None
        others = {
            name: value for name, value in inputs.items() if name not in (*FILLED, cache_name) and value is not None
        }
        kind = Kind(
            batch=len(inputs["input_ids"]),
            layers=len(cache.layers),
            dtype=cache.chunkwise_layers[0].dtype,
            layout=backend.layout if running.plan.segments else 0,
            reads_entropy=call.session.reads_entropy,
            others=tuple(sorted(others.items())),
        )
        step = self._take(kind, backend)
        step.begin()
        cache.begin_step(step.tables)
        try:
            step.fill(inputs, call.session.columns - 1, running.plan)
            logits, entropies = self._results(step, partial(step.compute, forward, cache_name, cache, running))
        except StepRefused as error:
            cache.undo_step()
            self.stop(str(error))
            return None
        cache.end_step()
        output = step.output(logits=logits.clone(), **{cache_name: cache})
        entropies = None if entropies is None else entropies.clone()
        step.end()
        with self._lock:
            if step.of_model is self._unchanged:
                self._unused.setdefault(kind, []).append(step)
        return output, entropies

    def _results(self, step: Step, compute: Callable[[], Results]) -> Results:
        """Compute a step, with a graph if there is one."""
        step.calls += 1
        if step.replay is None:
            results = compute()
            if step.calls > 1:

                def keep() -> None:
                    step.captured = compute()

                try:
                    step.replay = record(keep, step.tables.pools.device)
                except RuntimeError as error:
                    self.stop(f"the model cannot be captured ({first_line(error)})")
            return results
        step.replay()
        if not step.is_checked:
            step.is_checked = True
            results = compute()
            difference = float((step.captured[0] - results[0]).norm() / results[0].norm().clamp_min(1e-12))
            if not difference <= SAME[results[0].dtype]:
                self.stop(f"a replay differs from the model by {difference:.1g} of its logits")
                return results
        return step.captured

    def _take(self, kind: Kind, backend: TritonBackend) -> Step:
        """Return a step that no other call uses."""
        with self._lock:
            for other in [other for other in self._unused if other.layout not in (0, backend.layout)]:
                del self._unused[other]
            while len(self._unused) > MOST_KINDS:
                del self._unused[next(iter(self._unused))]
            unused = self._unused.pop(kind, [])
            if unused:
                step = unused.pop()
                self._unused[kind] = unused  # the latest kind last
                return step
        kernels = attention_on(backend.device, backend.dtype)
        assert kernels is not None  # checked by `ChunkWiseCache.can_step`
        with torch.inference_mode(False):  # so that calls outside of inference mode may fill the tensors, too
            step = Step(kind, StepTables(kernels, kind.layers, kind.batch, backend.device), backend)
        step.of_model = self._unchanged
        return step
