"""`chunkwise serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.options import named_paths
from chunkwise_lora.cli.output import print_plain
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

INSTALL = "pip install 'chunkwise-lora[serve]'"


def serve(
    model: Annotated[
        Path | None,
        typer.Option(help="GGUF file of the base model. By default that of smollm2, the example."),
    ] = None,
    ladder: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LADDER", help="Ladders or PEFT adapters by name; requests name them as `model`."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Settings of all adapters: one of {', '.join(PRESETS)}. By default each ladder's own policy."
        ),
    ] = None,
    factors: Annotated[
        str, typer.Option(help="Numbers of the adapters in memory: float16, float32 or int8.")
    ] = "float16",
    context: Annotated[int, typer.Option(min=16, help="Tokens of the context, prompt and answer together.")] = 4096,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default one for each core.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. By default only this machine can connect.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="CHUNKWISE_API_KEY", help="Key that requests must send as a bearer token.")
    ] = None,
) -> None:
    """Serve a GGUF model with adapters by llama-cpp-python's OpenAI-compatible server, one request after another."""
    sources = {name: str(examples.find(path)) for name, path in named_paths("--ladder", ladder).items()}
    config = None if preset is None else ChunkWiseConfig.preset(preset)
    path = examples.find_gguf(model)
    try:
        import uvicorn

        from chunkwise_lora.engines.llama_cpp.server import ServedLlama, create_app
    except ModuleNotFoundError as error:
        raise EngineError(f"the server needs more packages ({error}); run: {INSTALL}") from None
    cores = threads or os.cpu_count() or 1
    options = {"n_ctx": context, "n_threads": cores, "n_threads_batch": cores, "flash_attn": True, "verbose": False}
    llm = ServedLlama(str(path), sources, chunkwise_config=config, factors=factors, **options)
    app = create_app(llm, host=host, api_key=api_key)
    print_plain(f"Serving {path.name} with adapters {', '.join(llm.adapters) or 'none'} on http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning")
