"""The `chunkwise` command. One module per command; each imports heavy libraries only when its command runs."""

from chunkwise_lora.cli.app import main

__all__ = ["main"]
