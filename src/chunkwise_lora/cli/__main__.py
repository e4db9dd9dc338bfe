"""Runs the command as `python -m chunkwise_lora.cli`."""

from chunkwise_lora.cli.app import main

if __name__ == "__main__":
    main()
