"""Serve many adapters in little memory: ladders that give up rungs, against vLLM's own LoRA with as many slots.

    python benchmarks/vllm_adapter_memory.py --out runs/adapter-memory

64 adapters of rank 64 (random weights) share memory for 16. Requests ask for them by Zipf's law, 16 at a time. Measured
are tokens per second, the time that a request takes, and the rank at which it ran. What the lower ranks cost is
predicted from a calibrated ladder (`--calibrated`), for the same shares of the full rank.

Each method runs in a process of its own and writes a file to `--out`. A method whose file is there is not run again, so
an interrupted run goes on where it stopped. This needs vLLM (docs/vllm.md says how to install it).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = {
    "ladders, memory for 16": {"CHUNKWISE_ADAPTER_MEMORY": "{memory}"},
    "ladders, all at full rank": {},
    "vLLM's LoRA, others in RAM": {"CHUNKWISE_VLLM": "0"},
    "vLLM's LoRA, others on disk": {"CHUNKWISE_VLLM": "0"},
}
"""By name: variables of its process."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135M", help="shape of the model: 135M, 360M, 1B or 7B (default: 135M)")
    parser.add_argument("--layers", type=int, help="layers of the model, if fewer than its shape has")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapters (default: 64)")
    parser.add_argument("--adapters", type=int, default=64, help="number of adapters (default: 64)")
    parser.add_argument("--slots", type=int, default=16, help="adapters that fit at full rank (default: 16)")
    parser.add_argument("--requests", type=int, default=400, help="timed requests of each method (default: 400)")
    parser.add_argument("--at-once", type=int, default=16, help="requests that run at once (default: 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="methods to run")
    parser.add_argument("--calibrated", type=Path, help="calibrated ladder that predicts the loss of lower ranks")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the adapters and the results")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)  # run one method in this process
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Write the model, one ladder, and a folder with the same files for each adapter."""
    from chunkwise_lora import RankLadder
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter

    config = SHAPES[options.shape]
    config.max_position_embeddings, config.architectures = 1024, ["LlamaForCausalLM"]
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    config.save_pretrained(options.out / "model")
    ladder = options.out / "ladder"
    if not ladder.is_dir():
        RankLadder.from_peft(random_adapter(config, options.rank, options.out / "adapter")).save_pretrained(ladder)
    for number in range(1, options.adapters + 1):
        folder = options.out / "adapters" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for file in ladder.iterdir():
            (folder / file.name).unlink(missing_ok=True)
            os.link(file, folder / file.name)


def run(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Run a method in this process. Returns seconds of all, and of each request its seconds and its rank."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(options.out / "model"),
        dtype="float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        disable_log_stats=True,
        max_num_seqs=options.at_once,
        enable_prefix_caching=False,
        enforce_eager=True,
        enable_lora=True,
        max_loras=min(options.slots, options.at_once),
        max_cpu_loras=options.slots if "on disk" in method else options.adapters,
        max_lora_rank=max(8, options.rank),
    ).llm_engine
    chance = random.Random(0)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    weights = [1 / number for number in range(1, options.adapters + 1)]
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)
    warm_up = 2 * options.adapters
    added: dict[str, float] = {}
    taken: list[float] = []
    ranks: list[float] = []
    begun = 0.0
    number = 0
    while number < warm_up + options.requests or engine.has_unfinished_requests():
        while number < warm_up + options.requests and len(added) < options.at_once:
            if number == warm_up:
                begun = time.perf_counter()
            (adapter,) = chance.choices(range(1, options.adapters + 1), weights)
            ids = chance.choices(range(vocabulary), k=options.prompt)
            path = options.out / "adapters" / str(adapter)
            request = LoRARequest(path.name, adapter, str(path))
            engine.add_request(str(number), {"prompt_token_ids": ids}, params, lora_request=request)
            added[str(number)] = time.perf_counter()
            number += 1
        for output in engine.step():
            if output.finished:
                seconds = time.perf_counter() - added.pop(output.request_id)
                if int(output.request_id) >= warm_up:
                    told = (output.kv_transfer_params or {}).get("chunkwise", {"mean_rank": options.rank})
                    taken.append(seconds)
                    ranks.append(told["mean_rank"] / options.rank)
    return {"seconds": time.perf_counter() - begun, "requests": taken, "shares": ranks}


def predicted_loss(calibrated: Path | None, shares: list[float]) -> float | None:
    """The mean loss that a calibrated ladder predicts for these shares of the full rank, in nats per token."""
    import numpy as np

    from chunkwise_lora import RankLadder

    ladder = calibrated and RankLadder.load(calibrated)
    if ladder is None or ladder.rung_divergence is None:
        return None
    of_rung = np.array(ladder.rung_ranks) / ladder.rung_ranks[-1]
    return float(np.interp(shares, of_rung, ladder.rung_divergence).mean())


def report(options: argparse.Namespace) -> None:
    """Print the figures of all methods that have run."""
    print(f"{'':28} tokens/s   median   p99      mean rank  predicted loss (nats per token)")
    for method in options.methods:
        figures = json.loads(result(options, method).read_text())
        times, shares = sorted(figures["requests"]), figures["shares"]
        rate = len(times) * options.tokens / figures["seconds"]
        loss = predicted_loss(options.calibrated, shares)
        print(
            f"{method:28} {rate:8.1f} {times[len(times) // 2]:7.2f} s {times[int(0.99 * len(times))]:6.2f} s "
            f"{options.rank * sum(shares) / len(shares):8.1f}  {'not known' if loss is None else f'{loss:.4f}'}"
        )


def result(options: argparse.Namespace, method: str) -> Path:
    """The file of a method's figures."""
    return options.out / f"{'-'.join(method.replace(',', '').split())}.json"


def main() -> None:
    """Run each method that has no result yet, and print all."""
    options = arguments()
    if options.only:
        result(options, options.only).write_text(json.dumps(run(options, options.only)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options)
    from chunkwise_lora import RankLadder

    ladder = RankLadder.load(options.out / "ladder")
    memory = options.slots * sum(4 * module.cost * module.rank for module in ladder.modules.values())
    for method in options.methods:
        if not result(options, method).exists():
            own = {name: value.format(memory=memory) for name, value in METHODS[method].items()}
            for library in Path(sys.prefix, "lib").glob("libiomp5.so"):  # vLLM's documentation asks for it
                own["LD_PRELOAD"] = str(library)
            command = [sys.executable, *sys.argv, "--only", method]
            subprocess.run(command, env={**os.environ, **ENVIRONMENT, **own}, check=True)
    report(options)


if __name__ == "__main__":
    main()
