"""Latency and memory of ChunkWise beside the base model and PEFT. Quality is measured in `evaluation`."""
