"""Measuring quality, latency and memory against honest rivals."""
