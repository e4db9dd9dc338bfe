"""Time ladders in vLLM, vLLM's base model and vLLM's own LoRA, on random weights in a known shape.

    python benchmarks/vllm_lora.py --shape 135M --rank 16

All engines live in one process and take turns, so that other load on the machine affects all of them equally. The
figures are medians of ratios within a turn. This needs vLLM (docs/vllm.md says how to install it).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, CONCURRENT, ADAPTERS = 256, 8, 4


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135M", help="shape of the model: 135M, 360M, 1B or 7B (default: 135M)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the random adapters (default: 16)")
    parser.add_argument("--dtype", default="float32", help="number format, such as bfloat16 (default: float32)")
    parser.add_argument("--steps", type=int, default=24, help="timed decode steps of each method (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="timed prefills of each method (default: 5)")
    parser.add_argument("--own-rounds", type=int, default=2, help="timed prefills of vLLM's own LoRA (default: 2)")
    parser.add_argument("--throughput-rounds", type=int, default=1, help="rounds of concurrent requests (default: 1)")
    without = "methods to leave out: vLLM's own LoRA, the base model with the plug-in"
    parser.add_argument("--without", nargs="*", default=[], choices=("own", "loaded"), help=without)
    parser.add_argument("--compiled", action="store_true", help="compile the models, except for vLLM's own LoRA")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


class Engine:
    """An engine of vLLM in this process."""

    def __init__(self, model: Path, options: argparse.Namespace, **more: Any) -> None:
        from vllm import LLM

        self.engine = LLM(
            str(model),
            dtype=options.dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=1024,
            disable_log_stats=True,
            max_num_seqs=CONCURRENT,
            enable_prefix_caching=False,
            enforce_eager=not options.compiled or ("max_loras" in more and os.environ.get("CHUNKWISE_VLLM") == "0"),
            **more,
        ).llm_engine
        self._vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        self._requests = 0

    @property
    def planner(self) -> Any:
        """The planner of the engine's only worker."""
        return self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.chunkwise.planner

    def add(self, tokens: int, prompt: int, seed: int, adapter: Path | None = None, preset: str | None = None) -> None:
        """Queue a request of random tokens."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        ids = random.Random(seed).choices(range(self._vocabulary), k=prompt)
        extra = {"chunkwise_preset": preset} if preset else None
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
        request = adapter and LoRARequest(adapter.name, int(adapter.name), str(adapter))
        self._requests += 1
        self.engine.add_request(str(self._requests), {"prompt_token_ids": ids}, params, lora_request=request)

    def timed_step(self) -> float:
        """Run one pass. Returns seconds."""
        begun = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - begun

    def drain(self) -> float:
        """Run until all requests are finished. Returns seconds."""
        begun = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - begun


Methods = dict[str, tuple[Engine, Path | None, str | None]]
"""By name of what is timed: an engine, its adapter and its preset."""


def methods(folder: Path, options: argparse.Namespace) -> tuple[Methods, list[Path]]:
    """The methods to time, and the folders of all adapters."""
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter
    from chunkwise_lora.engines.vllm import plugin

    config = SHAPES[options.shape]
    config.max_position_embeddings, config.architectures = 1024, ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    adapters = [random_adapter(config, options.rank, folder / str(number), number) for number in range(1, ADAPTERS + 1)]
    lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": max(8, options.rank)}
    model = folder / "model"
    os.environ["CHUNKWISE_VLLM"] = "0"
    engines: Methods = {"base": (Engine(model, options), None, None)}
    if "own" not in options.without:
        engines["vLLM's LoRA"] = (Engine(model, options, **lora), adapters[0], None)
    del os.environ["CHUNKWISE_VLLM"]
    plugin.register()
    if "loaded" not in options.without:
        engines["base, plug-in loaded"] = (Engine(model, options), None, None)
    ladders = Engine(model, options, **lora)
    engines |= {preset: (ladders, adapters[0], preset) for preset in ("lossless", "balanced")}
    return engines, adapters


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure decoding, prefill and throughput."""
    engines, adapters = methods(folder, options)
    figures: dict[str, Any] = {}
    # Two presets share an engine, so the request of one must end before the other begins.
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    planning: dict[str, list[float]] = {}
    block = 8
    for turn in range(-1, max(1, options.steps // block)):
        for name, (engine, adapter, preset) in engines.items():
            engine.add(block + 2, 32, 0, adapter, preset)
            engine.engine.step()
            engine.engine.step()
            if preset is not None:
                engine.planner.record = lambda _, usage, name=name: planning.setdefault(name, []).append(usage.seconds)
            times = [engine.timed_step() for _ in range(block)]
            engine.drain()
            if turn >= 0:
                seconds[name] += times
    figures["decode"], figures["planning"] = seconds, planning
    seconds = {name: [] for name in engines}
    for turn in range(-1, options.rounds):
        for name, (engine, adapter, preset) in engines.items():
            if name == "vLLM's LoRA" and turn >= options.own_rounds:
                continue
            engine.add(1, PROMPT, turn, adapter, preset)
            taken = engine.drain()
            if turn >= 0:
                seconds[name].append(taken)
    figures["prefill"] = seconds
    figures["tokens_per_second"] = throughput(engines, adapters, options.throughput_rounds)
    return figures


def throughput(engines: Methods, adapters: list[Path], rounds: int) -> dict[str, list[float]]:
    """New tokens per second of concurrent requests that use several adapters."""
    rates: dict[str, list[float]] = {}
    for turn in range(-1, rounds):  # the first loads the adapters
        for name, (engine, adapter, preset) in engines.items():
            if name == "base, plug-in loaded":
                continue
            for number in range(CONCURRENT):
                engine.add(16, 32, number, adapter and adapters[number % ADAPTERS], preset)
            taken = engine.drain()
            if turn >= 0:
                rates.setdefault(name, []).append(CONCURRENT * 16 / taken)
    return rates


def report(figures: dict[str, Any]) -> None:
    """Print medians, and medians of ratios within a turn."""
    for what in ("decode", "prefill"):
        base = figures[what]["base"]
        for name, seconds in figures[what].items():
            ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=False))
            print(f"{what:8} {name:22} {1e3 * statistics.median(seconds):8.1f} ms   {ratio:6.2f} of base")
    decode = figures["decode"]
    pairs = zip(decode["balanced"], decode["lossless"], strict=True)
    print(f"decode   balanced / lossless {statistics.median(a / b for a, b in pairs):.3f}")
    for name, seconds in figures["planning"].items():
        print(f"planning {name:22} {1e6 * statistics.median(seconds):8.1f} µs per token")
    for name, rates in figures["tokens_per_second"].items():
        print(f"{CONCURRENT} requests, {ADAPTERS} adapters: {name:22} {statistics.median(rates):8.1f} tokens/s")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    report(figures)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**{k: str(v) for k, v in vars(options).items()}, **figures}, indent=1))


if __name__ == "__main__":
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    if "libiomp5" not in os.environ.get("LD_PRELOAD", ""):  # vLLM's documentation asks for it
        for library in Path(sys.prefix, "lib").glob("libiomp5.so"):
            os.environ["LD_PRELOAD"] = str(library)
            os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
