"""Plots of measurements, as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from chunkwise_lora.benchmark.measure import Measurement
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.files import write_atomically


def plot_bench(results: Sequence[Measurement], path: Path) -> None:
    """Draw decode latency, KV-cache bytes and peak memory against the context into the PNG file `path`.

    Every method is a line. Every batch size is a row of panels.

    Raises:
        ChunkWiseError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise ChunkWiseError("plots need matplotlib: pip install 'chunkwise-lora[eval]'") from None
    panels: dict[str, Callable[[Measurement], float | None]] = {
        "decode, ms per step": lambda result: result.decode_ms,
        "KV cache, MB": lambda result: result.kv_bytes / 1e6,
        "peak above the weights, MB": lambda result: result.peak_bytes and result.peak_bytes / 1e6,
    }
    if all(result.peak_bytes is None for result in results):
        panels.popitem()
    batches = sorted({result.batch for result in results})
    contexts = sorted({result.context for result in results})
    names = list(dict.fromkeys(result.name for result in results))
    figure = Figure(figsize=(4.7 * len(panels), 4 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches), len(panels), squeeze=False)
    for row, batch in zip(axes, batches, strict=True):
        for axis, (title, value) in zip(row, panels.items(), strict=True):
            for name in names:
                of_name = [result for result in results if result.name == name and result.batch == batch]
                points = [(result.context, value(result)) for result in of_name if value(result) is not None]
                style = "o-" if name.startswith("ChunkWise") else "s--"
                axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=name)
            axis.set(title=f"{title} (batch {batch})", xlabel="context, tokens", xscale="log", xticks=contexts)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
