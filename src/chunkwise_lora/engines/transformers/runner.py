"""Runs the forward passes and generations of one model by plan, for any number of threads."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache

from chunkwise_lora.engines.base import config_for
from chunkwise_lora.engines.transformers.adapters import LoadedAdapter
from chunkwise_lora.engines.transformers.attaching import AttachedModel
from chunkwise_lora.engines.transformers.calls import CALL, Call, running_call
from chunkwise_lora.engines.transformers.checks import GenerateOptions, check_prompt, refuse_options, refuse_type
from chunkwise_lora.engines.transformers.context import BETWEEN, PASS, REQUEST, ForwardPass, Request, request_of, within
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.fitting import device_of
from chunkwise_lora.engines.transformers.injection import Injection
from chunkwise_lora.engines.transformers.layers import BASE, MERGED
from chunkwise_lora.engines.transformers.session import Prompts, Session, SessionCache
from chunkwise_lora.engines.transformers.steps import DecodeSteps
from chunkwise_lora.engines.transformers.versions import CACHE_NAMES
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo
from chunkwise_lora.method.trace import Trace

if TYPE_CHECKING:
    from chunkwise_lora.backends.triton.backend import TritonBackend

logger = logging.getLogger(__name__)

LONG_PROMPT = 4096
"""Prompts with more tokens than this are prefilled in several passes if a KV policy acts, so that it limits the peak of
memory. Only the first pass of a prompt attends without a mask, which takes half the time, so one pass is faster."""

PREFILL_TOKENS = 512
"""Number of tokens of each of these passes."""


class Runner(AttachedModel):
    """Stands for one model in its passes and calls: decides for each what runs, and by which plan.

    Args:
        model: The model.
        injection: PEFT's modules, if they were put into a bare model only for this runner.
        config: Settings of the method for all adapters; None if each follows its own policy.
        fast: Which fast paths may run.
    """

    def __init__(
        self, model: PeftModel, injection: Injection | None, config: ChunkWiseConfig | None, fast: FastPaths
    ) -> None:
        super().__init__(model, injection, fast)
        self.config = config
        self._sessions: WeakKeyDictionary[Cache, Session] = WeakKeyDictionary()
        """The sessions of caches that are not of this engine."""
        self._traces = threading.local()
        self._last_trace: Trace | None = None
        self._said: set[str] = set()
        self._steps = DecodeSteps(self.base, fast.graphs and fast.kernels and fast.attention)

    @property
    def input_device(self) -> torch.device:
        """The device that takes token ids."""
        return device_of(self.base.get_input_embeddings(), self.base.device)

    # Calls

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        adapter_names: str | Sequence[str] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Replaces `generate` of the base model; see `ChunkWiseModel.generate`."""
        original = functools.partial(type(self.base).generate, self.base)
        asked_here = Request(self, adapter_names, chunkwise_config) if adapter_names or chunkwise_config else None
        request = asked_here or request_of(self)
        input_ids = options.pop("input_ids", inputs)
        if generation_config is not None:
            options["generation_config"] = generation_config
        given_as = [name for name in CACHE_NAMES if options.get(name) is not None]
        given = [options.pop(name) for name in given_as]
        asked = GenerateOptions(options, generation_config, self.base.generation_config)
        embeddings = options.get("inputs_embeds")
        batch, columns = (embeddings if input_ids is None and embeddings is not None else _checked(input_ids)).shape[:2]
        names = self._names(request, batch)
        if names is None:
            options |= dict.fromkeys(given_as, given[0]) if given else {}
            self._set_trace(None)
            with self.turns.a_call(in_peft=True), self._in_peft():
                return original(input_ids, *args, **options)
        use_cache = asked.use_cache is not False and self.traits.cache_name is not None
        refuse_options(asked, use_cache)
        check_prompt(self.base, input_ids, options)
        eos = asked.eos_token_id
        eos_ids = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
        with ExitStack() as stack:
            if given:
                call = stack.enter_context(self._continuing(given[0], request, input_ids, eos_ids))
            else:
                takes_cache = use_cache and self.traits.takes_cache
                call = stack.enter_context(self._open(names, request.config, columns, eos_ids, takes_cache))
            if call.cache is not None and self.traits.cache_name is not None:
                long = call.session.acts and columns - call.session.columns > LONG_PROMPT
                if long and self.traits.prompt_passes_are_safe(asked):
                    options.setdefault("prefill_chunk_size", PREFILL_TOKENS)
                options[self.traits.cache_name] = call.cache
            self._set_trace(None)
            output = original(input_ids, *args, **options)
            self._set_trace(call.trace())
            return output

    @contextmanager
    def stream(self, request: Request, batch: int, prompt_columns: int) -> Iterator[Call]:
        """Open a call for passes that the user runs; see `ChunkWiseModel.stream`."""
        names = self._names(request, batch)
        if names is None:
            raise EngineError("several adapters are active at once; name one with adapter_names")
        with self._open(names, request.config, prompt_columns, (), self.traits.takes_cache) as call:
            yield call

    @property
    def trace(self) -> Trace | None:
        """What the last generation of this thread did, or of any thread if this one ran none."""
        return getattr(self._traces, "last", self._last_trace)

    def _set_trace(self, trace: Trace | None) -> None:
        self._traces.last = self._last_trace = trace

    @contextmanager
    def _open(
        self,
        names: Sequence[str],
        config: ChunkWiseConfig | None,
        columns: int,
        eos_token_ids: Collection[int],
        takes_cache: bool,
    ) -> Iterator[Call]:
        """Run a new call for prompts with these adapters."""
        if not self.attached:
            raise EngineError("the model is detached; call attach() first")
        with self.turns.a_call(), self.using(names) as used:
            session = self._new_session(used, config, columns, eos_token_ids)
            cache = session.new_cache(self._fast.kernels) if takes_cache else None
            call = Call(self, session, cache, self.traits.cache_name)
            with self._running(call):
                yield call

    @contextmanager
    def _running(self, call: Call) -> Iterator[None]:
        names = frozenset(BASE if info is NO_ADAPTER else info.name for info in call.session.adapters)
        try:
            with within(CALL, call), within(BETWEEN, (self, names)):
                yield
        finally:
            call.has_ended = True

    @contextmanager
    def _continuing(
        self, cache: object, request: Request, input_ids: Tensor, eos_token_ids: Collection[int]
    ) -> Iterator[Call]:
        """Run a call that goes on with the cache of an earlier one."""
        if not isinstance(cache, SessionCache) or not cache.session.belongs_to(self):
            raise EngineError(
                "past_key_values must be a cache that an earlier call of this model returned; pass the whole prompt"
            )
        session = cache.session
        if session.columns:
            session.continue_with(input_ids, eos_token_ids)
        self._refuse_another_plan(session, request)
        call = Call(self, session, cache, self.traits.cache_name)
        with self.turns.a_call(), self.adapters.holding(session.adapters), self._running(call):
            yield call

    def _refuse_another_plan(self, session: Session, request: Request) -> None:
        """Refuse other adapters or settings than those with which a cache was made."""
        if request.adapter_names is not None:
            asked = self._named(request.adapter_names, len(session.adapters))
            made = [BASE if info is NO_ADAPTER else info.name for info in session.adapters]
            if asked != made:
                raise EngineError(
                    f"the cache was made with the adapters {', '.join(made)}; another adapter needs its own cache"
                )
        if request.config is not None and any(config != request.config for config in session.configs):
            raise EngineError("the cache was made with other settings; pass no chunkwise_config, or no cache")

    def _new_session(
        self,
        used: Sequence[LoadedAdapter | None],
        config: ChunkWiseConfig | None,
        columns: int,
        eos_token_ids: Collection[int] = (),
    ) -> Session:
        """Return a session for prompts of `columns` columns."""
        refuse_type("chunkwise_config", config, ChunkWiseConfig)
        configs = [config_for(one.ladder if one else None, call=config, model=self.config) for one in used]
        for note in dict.fromkeys(note for one in configs for note in self.kv_left_undone(one.kv_cache)):
            logger.warning("KV policy: %s", note)
        infos: list[AdapterInfo] = [one.info if one else NO_ADAPTER for one in used]
        notes = dict.fromkeys(note for one in used if one for note in one.notes)
        if any(config.levels > 1 for config in configs):
            notes |= dict.fromkeys(note for one in used if one for note in self.adapters.notes_on_order(one))
        return Session(self, self.traits, Prompts(infos, configs, columns, eos_token_ids, tuple(notes)))

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that the model does not allow, and the reasons."""
        return list(self.traits.kv_notes) if config.acts else []

    # Adapters of a call

    @contextmanager
    def request(self, *args: Any, adapter_names: Sequence[str] | None = None, **options: Any) -> Iterator[None]:
        """Set the adapter names of the calls inside the block, as PEFT asks for."""
        if options.get("alora_offsets") is not None:
            raise EngineError("activated LoRA is not supported; detach() and run it in PEFT")
        if adapter_names is None:
            yield
            return
        with within(REQUEST, Request(self, adapter_names, request_of(self).config)):
            yield

    def _names(self, request: Request, batch: int) -> list[str] | None:
        """Return the adapter of each sequence; None if only PEFT can run what is active."""
        names = None if request.adapter_names is None else self._named(request.adapter_names, batch)
        with self.turns.a_pass():
            asked = self._forwards.asked()
            active = self.model.base_model.active_adapters
        if any(one.merged for one in asked):
            return self._merged_names(request, batch, disabled=any(one.disabled for one in asked))
        if names is not None:
            return names
        if asked and all(one.disabled for one in asked):
            return [BASE] * batch
        found = frozenset[str]().union(*(one.active for one in asked))
        if not found and len(active) == 1 and not any(active[0] in one.known for one in asked):
            found = frozenset(active)  # an adapter without LoRA layers
        if len(found) > 1 or any(found & one.known != one.active for one in asked):
            self._say("not one adapter is active in all layers; PEFT runs them, at full rank and without a KV policy")
            return None
        return [*(found or [BASE])] * batch

    def _merged_names(self, request: Request, batch: int, disabled: bool) -> list[str] | None:
        """Return `_names` of a model with merged adapters."""
        if disabled:  # PEFT unmerges in its next forward, and would do so under other passes
            self.model.base_model.unmerge_adapter()
            return self._names(request, batch)
        if request.adapter_names is not None:
            raise EngineError(f"adapter_names cannot be given: {MERGED}")
        self._say("merged adapters are part of the weights; PEFT runs the model, at full rank and without a KV policy")
        return None

    def _named(self, names: str | Sequence[str], batch: int) -> list[str]:
        refuse_type("adapter_names", names, str, Sequence)
        names = [names] * batch if isinstance(names, str) else list(names)
        if len(names) != batch:
            raise EngineError(f"adapter_names has {len(names)} names for {batch} prompts; give one per prompt")
        known = self.adapters.names
        for name in names:
            if name != BASE and name not in known:
                raise EngineError(f"adapter {name!r} is not loaded; loaded are {', '.join([*known, BASE])}")
        return names

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[list[LoadedAdapter | None]]:
        """Use the current versions of adapters, and keep them loaded meanwhile."""
        unique = [name for name in dict.fromkeys(names) if name != BASE]
        held = None
        while held is None:  # until no adapter has been deleted between loading and holding it
            with self.turns.a_pass():
                stale = self.adapters.stale(unique)
            if stale:
                with self.turns.a_change("loading an adapter"):
                    for name in self.adapters.stale(unique):
                        self.adapters.load(name)
            held = self.adapters.hold(unique)
        try:
            yield [held.get(name) for name in names]
        finally:
            if self.adapters.release(held.values()):
                with suppress(EngineError), self.turns.a_change("freeing an adapter"):  # or later, if inside a pass
                    self.adapters.free_retired()

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)

    # Passes

    def run(self, called: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run a forward pass of the model or its body.

        Args:
            called: The module that is called.
            forward: Its own forward.
            inputs: Its keyword arguments.
        """
        request = request_of(self)
        if "adapter_names" in inputs or "chunkwise_config" in inputs:
            request = Request(self, inputs.pop("adapter_names", None), inputs.pop("chunkwise_config", None))
        call = running_call(self)
        if call is not None and call.is_restarted_by(inputs):
            call.restart(self._fast.kernels)
            inputs[str(call.takes_cache_as)] = call.cache
        if call is not None and call.owns(inputs):
            return self._pass(called, forward, inputs, call)
        cache_name = self.traits.cache_name
        cache = inputs.get(cache_name) if cache_name else None
        if self.base.training or self._records_gradients():
            return self._run_with_gradients(called, forward, inputs, request)
        if isinstance(cache, SessionCache):
            if not cache.session.belongs_to(self):
                raise EngineError("the cache belongs to another model")
            self._refuse_another_plan(cache.session, request)
            with self.adapters.holding(cache.session.adapters):
                return self._pass(called, forward, inputs, Call(self, cache.session, cache, cache_name))
        if isinstance(cache, Cache) and cache in self._sessions:
            session = self._sessions[cache]
            with self.adapters.holding(session.adapters):
                return self._pass(called, forward, inputs, Call(self, session, None, cache_name))
        batch, columns = self._shape_of(inputs, cache)
        names = self._names(request, batch)
        if names is None:
            return self._run_in_peft(forward, inputs)
        with self.turns.a_call(), self.using(names) as used:
            session = self._new_session(used, request.config, columns)
            return self._first_pass(called, forward, inputs, cache, session)

    @contextmanager
    def _in_peft(self) -> Iterator[None]:
        """Let layers run as in PEFT, also inside a call of the same thread."""
        with within(PASS, None), within(CALL, None), within(BETWEEN, None):
            yield

    def _run_in_peft(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run a pass as in PEFT."""
        with self.turns.a_pass(), self._in_peft():
            return forward(**inputs)

    def _run_with_gradients(
        self, called: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any], request: Request
    ) -> Any:
        """Run a pass that trains the model or records gradients of its parameters: as in PEFT."""
        if isinstance(inputs.get(self.traits.cache_name or ""), SessionCache):
            raise EngineError("a cache of this engine records no gradients; use torch.no_grad(), or no cache")
        if request.adapter_names is None:
            return self._run_in_peft(forward, inputs)
        if self.base.training:
            raise EngineError("adapter_names cannot be given in training; call set_adapter(), or eval() first")
        with torch.no_grad(), within(REQUEST, request):  # rather than gradients that leave out the adapters
            return self.run(called, forward, inputs)

    def _shape_of(self, inputs: dict[str, Any], cache: Any) -> tuple[int, int]:
        """Return the numbers of sequences and tokens of a first pass, and refuse impossible token ids."""
        embeddings: Tensor | None = inputs.get("inputs_embeds")
        if embeddings is not None:
            return embeddings.shape[0], embeddings.shape[1]
        input_ids: Any = inputs.get("input_ids")
        if not _holds_tokens(cache):
            check_prompt(self.base, input_ids, inputs)
        return _checked(input_ids).shape[0], input_ids.shape[1]

    def _first_pass(
        self, called: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any], cache: Any, session: Session
    ) -> Any:
        """Run the first pass of a session that the user begins by calling the model."""
        cache_name = self.traits.cache_name
        if inputs.get("input_ids") is None and not session.knows_no_tokens:
            self._say("plans are made from token ids; passes over embeddings run in PEFT at full rank")
            return self._run_in_peft(forward, inputs)
        if _holds_tokens(cache) and not session.knows_no_tokens:
            raise EngineError(
                "the tokens of this cache are unknown, so the model cannot continue it by plan; begin with the whole "
                "text and no cache, or use the lossless preset"
            )
        own = None
        if cache is None and cache_name is not None and self.traits.takes_cache and self._uses_cache(inputs):
            own = inputs[cache_name] = session.new_cache(self._fast.kernels)
        output = self._pass(called, forward, inputs, Call(self, session, own, cache_name))
        if own is None and cache_name is not None:
            kept = cache if cache is not None else getattr(output, cache_name, None)
            if isinstance(kept, Cache):
                self._sessions[kept] = session
        return output

    def _uses_cache(self, inputs: dict[str, Any]) -> bool:
        asked = inputs.get("use_cache")
        return bool(self.base.config.get_text_config(decoder=True).use_cache if asked is None else asked)

    def _records_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.base.parameters())

    def _pass(self, called: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any], call: Call) -> Any:
        """Run one pass of a call."""
        session, name = call.session, self.traits.cache_name
        given = inputs.get(name) if name is not None else None
        cache = call.cache if given is not None and given is call.cache else None
        if self._fast.products and self.traits.picks_logits and self.input_device.type == "cpu":
            _index_last_token(inputs)
        with self.turns.a_pass():
            first = not session.columns
            backend = self._backend_of_steps(called, inputs, session, cache)
            plan = session.before_pass(inputs, cache, given is not None, backend is None)
            running = ForwardPass(
                owner=self,
                plan=plan,
                members=session.members,
                full_rungs=session.full_rungs,
                is_constant=session.is_constant,
                is_constant_per_sequence=session.knows_no_tokens,
                batch=session.batch,
            )
            stepped = None
            if backend is not None and cache is not None:
                stepped = self._steps.run(forward, inputs, replace(call, cache=cache), running, backend)
                if stepped is None:
                    session.set_mask(inputs, cache)
            if stepped is not None:
                session.after_pass(_logits(stepped[0]), cache, stepped[1])
                return stepped[0]
            with within(PASS, running):
                output = forward(**inputs)
            if first and called is self.base and plan.segments and not running.layers and self.adapters.runs_gated:
                raise EngineError(
                    f"{type(self.base).__name__} did not run the adapted layers: its forward has replaced or skipped "
                    "them; detach() and run it in PEFT"
                )
            session.after_pass(_logits(output) if called is self.base else None, cache)
        return output

    def _backend_of_steps(
        self, called: nn.Module, inputs: dict[str, Any], session: Session, cache: SessionCache | None
    ) -> TritonBackend | None:
        """Return the backend for a pass that may run as a decode step; None if it must run as usual."""
        backend = self.adapters.backend
        fits = (
            called is self.base
            and getattr(backend, "name", None) == "triton"
            and self.traits.cuts_text
            and self._forwards.run_alike
            and self._steps.fit(inputs, session, cache)
        )
        return cast("TritonBackend", backend) if fits else None


def _index_last_token(inputs: dict[str, Any]) -> None:
    """Ask for the logits of the last token by its index.

    By its number the model takes a slice, for which PyTorch copies the weight of the output head on the CPU.
    """
    input_ids = inputs.get("input_ids")
    if inputs.get("logits_to_keep") == 1 and input_ids is not None and input_ids.shape[1] > 1:
        inputs["logits_to_keep"] = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)


def _holds_tokens(cache: Any) -> bool:
    """Return whether a cache that the user gives is in use. A recurrent model's cache has no length, but states."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length())
    except ValueError:
        return bool(cache.has_previous_state())


def _checked(input_ids: object) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise EngineError("input_ids must be a (batch, tokens) tensor of token ids")
    return input_ids


def _logits(output: Any) -> Tensor | None:
    """Return the logits (batch, tokens, vocabulary) in a model's output."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Tensor) and part.ndim == 3), None)
    return getattr(output, "logits", None)
