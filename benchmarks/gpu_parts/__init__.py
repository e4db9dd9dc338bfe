"""The parts of `benchmarks/gpu.py`. Each yields cells, which are measured one by one."""
