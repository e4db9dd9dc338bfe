"""A llama.cpp model that runs with adapters."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import LlamaState

from chunkwise_lora.engines.base import config_for
from chunkwise_lora.engines.llama_cpp import batch, kv
from chunkwise_lora.engines.llama_cpp.adapters import LoadedAdapter, check_element, shapes_of
from chunkwise_lora.engines.llama_cpp.base_model import base_of
from chunkwise_lora.engines.llama_cpp.carrier import Carrier
from chunkwise_lora.engines.llama_cpp.fallback import OwnLora, one_rung, runner
from chunkwise_lora.engines.llama_cpp.graph import Graph
from chunkwise_lora.engines.llama_cpp.selfcheck import TESTED, check_kernels
from chunkwise_lora.engines.llama_cpp.session import Request, Running, Session
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.batch import BatchPlanner
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.sequence import NO_ADAPTER
from chunkwise_lora.method.trace import Trace

BASE = "__base__"
"""The adapter name of requests that run without an adapter, as in PEFT."""
DEFAULT = "default"
"""The name of an adapter that was given without a name, as in PEFT."""

NO_CONTEXT = "Failed to create llama_context"
"""What llama-cpp-python says if llama.cpp refuses options, such as a q8_0 cache for heads of width 16."""

Source = RankLadder | str | Path
"""A ladder, or the folder or hub name of a ladder or a PEFT adapter."""

_REFUSED = {
    "lora_path": "give the adapter as a ladder or a PEFT folder",
    "lora_base": "adapters are not merged",
    "draft_model": "a plan follows the tokens that were accepted",
}


class ChunkWiseState(LlamaState):
    """A saved state of the model, with the plan of its tokens."""

    running: Running | None


class ChunkWiseLlama(llama_cpp.Llama):
    """`llama_cpp.Llama` with adapters whose rank is chosen chunk by chunk.

    It has the same methods, and nearly the same arguments. Methods that run the model also take `adapter=` and
    `chunkwise_config=`::

        llm = ChunkWiseLlama("model.gguf", {"squad": "ladder", "e2e": "other"}, n_ctx=4096)
        llm.create_chat_completion(messages, adapter="squad")
        llm.trace

    Like `llama_cpp.Llama`, it runs one request at a time.

    Args:
        model_path: The GGUF file.
        adapters: A ladder, the folder or hub name of a ladder or a PEFT adapter, or several of these by name.
        chunkwise_config: Settings of the method for all adapters. By default each ladder follows its own policy; a
            ladder without a policy runs `lossless`. If all levels of this config store INT8, the KV cache is q8_0 by
            default.
        factors: Element type of the adapters in memory: `float16`, `float32` (the most exact) or `int8` (the smallest).
        max_sequences: Largest number of prompts of `create_completions`.
        options: As for `llama_cpp.Llama`, but for `lora_path`, `lora_base` and `draft_model`, which are refused.

    Raises:
        EngineError: The model or an option cannot run with adapters, or an adapter does not fit the model.
        LadderError: An adapter cannot be read.
    """

    n_tokens: int

    def __init__(
        self,
        model_path: str,
        adapters: Source | Mapping[str, Source] | None = None,
        *,
        chunkwise_config: ChunkWiseConfig | None = None,
        factors: str = "float16",
        max_sequences: int = 1,
        **options: Any,
    ) -> None:
        self._stack = ExitStack()  # what `close` needs, should loading fail
        check_element(factors)
        if not (isinstance(max_sequences, int) and 1 <= max_sequences <= llama_cpp.llama_max_parallel_sequences()):
            raise EngineError(
                f"max_sequences={max_sequences!r}: give a number from 1 to {llama_cpp.llama_max_parallel_sequences()}"
            )
        self.max_sequences = max_sequences
        """Largest number of prompts of `create_completions`."""
        _check_options(options, max_sequences)
        self.chunkwise_config = chunkwise_config
        """The config for all adapters; None if each ladder follows its own policy."""
        self._factors = factors
        self._graph = runner(factors, options.get("n_gpu_layers", 0))
        self._adapters: dict[str, LoadedAdapter] = {}
        self._request: Request | None = None
        self._turn = 0
        self._load(model_path, options)
        if self._is_recurrent or self._is_hybrid or llama_cpp.llama_model_has_encoder(self.model):
            raise EngineError(f"{model_path}: only models that are decoders with attention run with adapters")
        self._base = base_of(self)
        self._carrier = Carrier(self)
        if isinstance(self._graph, Graph):
            self._reserve(self._graph)
        else:
            self._graph.attach(self._carrier, self._base)
        self._graph.install({})
        given = adapters if isinstance(adapters, Mapping) else {} if adapters is None else {DEFAULT: adapters}
        for name, source in given.items():
            self._add(source, name)
        self._session = Session(self, self._graph, self.request)
        self._ctx.decode = self._session.decode
        self._install()

    def _load(self, model_path: str, options: dict[str, Any]) -> None:
        """Load the model, if possible with a cache of the type that the config asks for."""
        is_free = "type_k" not in options and "type_v" not in options
        chosen = kv.type_options(self.chunkwise_config) if is_free else {}
        for more in (chosen, {}) if chosen else ({},):
            try:
                super().__init__(model_path, **{**more, **options})
                return
            except ValueError as error:
                reason = str(error)
            if NO_CONTEXT not in reason:
                raise EngineError(f"{model_path}: {reason}; give a complete GGUF file of a model")
        raise EngineError(f"{model_path}: llama.cpp refuses these options for this model; verbose=True shows why")

    def _reserve(self, graph: Graph) -> None:
        threads = max(self.n_threads, self.n_threads_batch)
        head_numbers = llama_cpp.llama_model_n_head(self.model) * (max(kv.head_widths(self)) + 2)
        graph.reserve(self.n_batch, self.context_params.n_ubatch, threads, head_numbers)

    @property
    def context_params(self) -> Any:
        """The parameters of the llama.cpp context."""
        return self.__dict__["context_params"]

    @context_params.setter
    def context_params(self, params: Any) -> None:
        # Llama sets further parameters, and then makes the context.
        self._graph.observe(params)
        if self.max_sequences > 1:
            params.n_seq_max, params.kv_unified = self.max_sequences, True
        self.__dict__["context_params"] = params

    def __getstate__(self) -> dict[str, Any]:
        ladders = {name: adapter.ladder for name, adapter in self._adapters.items()}
        return {
            **super().__getstate__(),
            "adapters": ladders,
            "chunkwise_config": self.chunkwise_config,
            "factors": self._factors,
            "max_sequences": self.max_sequences,
        }

    # Adapters

    @property
    def adapters(self) -> dict[str, RankLadder]:
        """The ladders of the loaded adapters, by name."""
        return {name: adapter.ladder for name, adapter in self._adapters.items()}

    @property
    def default_adapter(self) -> str:
        """The adapter of requests that name none: the one that was loaded first."""
        return next(iter(self._adapters), BASE)

    def load_adapter(self, source: Source, adapter_name: str = DEFAULT) -> None:
        """Load an adapter as `adapter_name`. It replaces an adapter of the same name, and ends a running text.

        Raises:
            EngineError: The name is reserved, or the adapter does not fit the model.
            LadderError: The adapter cannot be read, or holds NaN or infinity.
        """
        try:
            self._add(source, adapter_name)
        finally:
            self._install()

    def delete_adapter(self, adapter_name: str) -> None:
        """Unload an adapter. This ends a running text.

        Raises:
            EngineError: It is not loaded.
        """
        self._adapter(adapter_name)
        del self._adapters[adapter_name]
        self._install()

    def _add(self, source: Source, name: str) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            raise EngineError(f"an adapter cannot be called {name!r}; choose another name")
        if not isinstance(source, (RankLadder, str, Path)):
            raise EngineError(f"adapter {name!r} is a {type(source).__name__}; give a RankLadder, or a folder")
        ladder = source if isinstance(source, RankLadder) else RankLadder.load(source)
        loaded = LoadedAdapter.load(name, ladder, self._base, self._factors)
        if isinstance(self._graph, Graph) and self._base.architecture.name not in TESTED:
            check_kernels(self, self._graph, self._carrier, loaded)
        self._adapters[name] = loaded

    def _install(self) -> None:
        self._session.end()
        self.n_tokens, self._requires_eval = 0, True
        self._turn += 1
        if isinstance(self._graph, Graph):
            self._carrier.cover(self._base.architecture.name, shapes_of(self._adapters))
        self._graph.install({adapter.info.key: adapter for adapter in self._adapters.values()})

    def _adapter(self, name: str) -> LoadedAdapter:
        if name not in self._adapters:
            loaded = ", ".join([*self._adapters, BASE])
            raise EngineError(f"adapter {name!r} is not loaded; loaded are {loaded}")
        return self._adapters[name]

    # Requests

    @contextmanager
    def using(self, adapter: str | None = None, chunkwise_config: ChunkWiseConfig | None = None) -> Iterator[None]:
        """Run the texts that begin within this block with an adapter and settings, low-level methods included.

        Args:
            adapter: The adapter's name; `"__base__"` means none. By default it is the adapter that was loaded first.
            chunkwise_config: Settings that override those of the model and the adapter's policy.

        Raises:
            EngineError: The adapter is not loaded.
            ConfigError: The settings need what calibration learns, and the adapter's ladder does not hold it.
        """
        with self._running(self.request(adapter, chunkwise_config)):
            yield

    @contextmanager
    def _running(self, request: Request) -> Iterator[None]:
        before, self._request = self._request, request
        try:
            yield
        finally:
            self._request = before

    def request(self, adapter: str | None = None, config: ChunkWiseConfig | None = None) -> Request:
        """Return what `using` runs with, checked. What is not given is that of the block around it."""
        outer = self._request
        if outer is None:
            return self.request_alone(adapter, config)
        if adapter is None and config is None:
            return outer  # another method of the same request, for example
        adapter = (outer.adapter.name or BASE) if adapter is None else adapter
        return self.request_alone(adapter, outer.asked if config is None else config)

    def request_alone(self, adapter: str | None = None, config: ChunkWiseConfig | None = None) -> Request:
        """Return what a text runs with outside of all blocks, checked."""
        if config is not None and not isinstance(config, ChunkWiseConfig):
            raise EngineError(f"chunkwise_config is a {type(config).__name__}; give a ChunkWiseConfig")
        name = adapter if adapter is not None else self.default_adapter
        loaded = None if name == BASE else self._adapter(name)
        applied = config_for(None if loaded is None else loaded.ladder, call=config, model=self.chunkwise_config)
        if isinstance(self._graph, OwnLora):
            applied = one_rung(applied)
        return Request(NO_ADAPTER if loaded is None else loaded.info, applied, config)

    def create_completion(
        self,
        *arguments: Any,
        adapter: str | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Complete a prompt like `Llama.create_completion`. For the two new arguments see `using`."""
        with self.using(adapter, chunkwise_config):
            return super().create_completion(*arguments, **options)

    __call__ = create_completion

    def create_completions(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        adapter: str | Sequence[str | None] | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        max_tokens: int = 16,
        temperature: float = 0.8,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Complete several prompts in one batch. The answer has a choice for each prompt.

        Each choice is what `create_completion` gives for its prompt alone, up to rounding.

        Args:
            prompts: Texts or token ids; at most `max_sequences`.
            adapter: The adapter of all prompts, or one for each prompt; see `using`.
            chunkwise_config: Settings of all prompts; see `using`.
            max_tokens: Largest number of new tokens of each prompt.
            temperature: As for `create_completion`.
            stop: Strings that end a text.
            seed: Seed of the first prompt. Prompt i has `seed` + i. By default it is the model's seed.
            sampling: `top_k`, `top_p`, `min_p`, `typical_p`, `repeat_penalty` and others, as for `generate`.

        Raises:
            EngineError: An adapter is not loaded, or the batch does not fit into the context.
        """
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise EngineError(f"adapter has {len(names)} names for {len(prompts)} prompts; give one per prompt")
        requests = [self.request(name, chunkwise_config) for name in names]
        tokens = [self._tokens(prompt) for prompt in prompts]
        batch.check_room(self, tokens, max_tokens)
        first, rows = self._seed if seed is None else seed, []
        for index, (prompt, request) in enumerate(zip(tokens, requests, strict=True)):
            self.set_seed((first + index) % 2**32)
            rows.append(batch.Row(index, prompt, request, self._init_sampler(temp=temperature, **sampling)))
        self.set_seed(first)
        self._turn += 1
        stops = [text.encode() for text in ([stop] if isinstance(stop, str) else stop)]
        batch.complete(self, self._session, rows, max_tokens, stops)
        return batch.answer(self, rows)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt, as `create_completion` makes them."""
        if not isinstance(prompt, str):
            return list(prompt)
        first = [self.token_bos()] if self._model.add_bos_token() and self.token_bos() != -1 else []
        return first + self.tokenize(prompt.encode(), add_bos=False, special=True)

    def create_chat_completion(
        self,
        *arguments: Any,
        adapter: str | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Answer a chat like `Llama.create_chat_completion`. For the two new arguments see `using`."""
        request = self.request(adapter, chunkwise_config)
        with self._running(request):
            answer = super().create_chat_completion(*arguments, **options)
        return self._steps(answer, request) if isinstance(answer, Iterator) else answer

    def _create_completion(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        return self._steps(super()._create_completion(*arguments, **options), self.request())

    def _steps(self, steps: Iterator[Any], request: Request) -> Iterator[Any]:
        """Run the steps of a generator for a request, whatever the caller does between them."""
        try:
            while True:
                with self._running(request):
                    try:
                        step = next(steps)
                    except StopIteration:
                        return
                yield step
        finally:
            if isinstance(steps, Generator):
                steps.close()

    def embed(
        self,
        *arguments: Any,
        adapter: str | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Embed texts like `Llama.embed`. For the two new arguments see `using`."""
        self._session.end()
        self._turn += 1
        with self.using(adapter, chunkwise_config):
            return super().embed(*arguments, **options)

    def create_embedding(
        self,
        *arguments: Any,
        adapter: str | None = None,
        chunkwise_config: ChunkWiseConfig | None = None,
        **options: Any,
    ) -> Any:
        """Embed texts like `Llama.create_embedding`. For the two new arguments see `using`."""
        with self.using(adapter, chunkwise_config):
            return super().create_embedding(*arguments, **options)

    # Running

    def generate(self, tokens: Sequence[int], *arguments: Any, reset: bool = True, **options: Any) -> Any:
        """Generate like `Llama.generate`. Tokens in the context are used again only if their plan is the same."""
        request, tokens = self.request(), list(tokens)
        if reset:
            self.n_tokens = self._session.reusable(request, tokens, self.n_tokens)
            self._requires_eval = True
            self._session.begin(request, tokens)
        self._turn += 1
        turn, sent = self._turn, None
        steps = super().generate(tokens, *arguments, reset=reset, **options)
        while True:
            try:
                token = steps.send(sent)
            except StopIteration:
                return
            sent = yield token
            if turn != self._turn:
                raise EngineError("another request began on this model before this one ended; use one model for each")

    def eval(self, tokens: Sequence[int]) -> None:
        """Run tokens like `Llama.eval`. The tokens of the call that begins a text are planned as its prompt."""
        if len(tokens) and self._session.begins(self.n_tokens):
            self._session.begin(self.request(), list(tokens))
        super().eval(tokens)

    @property
    def trace(self) -> Trace | None:
        """What the last request did; None before the first one."""
        return self._session.trace()

    @property
    def planner(self) -> BatchPlanner:
        """The planner of the sequences in the context."""
        return self._session.planner

    def kv_left_undone(self, config: KVCacheConfig) -> list[str]:
        """Return the parts of a KV policy that this model does not carry out, and the reasons."""
        return kv.left_undone(self, config)

    # State

    def save_state(self) -> ChunkWiseState:
        """Save the context like `Llama.save_state`, with the plan of its tokens."""
        state = ChunkWiseState(**vars(super().save_state()))
        state.running = self._session.saved()
        return state

    def load_state(self, state: LlamaState) -> None:
        """Restore a state of `save_state`. The text continues with the adapter that it began with.

        Raises:
            EngineError: The state has no plan, or its adapter is not loaded.
        """
        if not isinstance(state, ChunkWiseState):
            raise EngineError("this state was not saved by a model with adapters; run the text again")
        self._turn += 1
        self._session.restore(state.running, {adapter.info.key: adapter.info for adapter in self._adapters.values()})
        super().load_state(state)


def _check_options(options: Mapping[str, Any], max_sequences: int) -> None:
    """Refuse options of `llama_cpp.Llama` that this engine does not have, or for which llama.cpp ends the process."""
    for name, remedy in _REFUSED.items():
        if options.get(name) is not None:
            raise EngineError(f"{name} cannot be used with this engine; {remedy}")
    for name, least in (("n_ctx", max_sequences), ("n_batch", max_sequences), ("n_ubatch", 1)):
        given = options.get(name, least)
        if given < least and (name, given) != ("n_ctx", 0):  # 0: as many as the model has positions
            raise EngineError(f"{name}={given}: give at least {least}")
