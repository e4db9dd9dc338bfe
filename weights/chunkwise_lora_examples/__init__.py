"""Example ladders for chunkwise-lora."""

from pathlib import Path

LADDERS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/chunkwise.json"))}
"""Folders of the ladders by name."""
