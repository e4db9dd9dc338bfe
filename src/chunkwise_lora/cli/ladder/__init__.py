"""The commands of `chunkwise ladder`."""
