"""The results of all parts as a page and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_parts import calibration, correctness, engine, products, tenants
from gpu_parts.cells import Results

PARTS: dict[str, Any] = {
    "correctness": correctness,
    "products": products,
    "tenants": tenants,
    "engine": engine,
    "calibration": calibration,
}
"""The parts by name, in the order in which they run."""


def page(results: Results, stopped: str) -> str:
    """Return all results as Markdown.

    Args:
        results: What was measured.
        stopped: Why the last run has not measured everything; empty if it has.
    """
    lines = ["# On a GPU", "", f"Measured by `python benchmarks/gpu.py` on {'; '.join(results.machines)}.", ""]
    if any(cell.get("tiny") for cell in results.cells.values()):
        lines += ["**Tiny sizes, to test the script: the times mean nothing.**", ""]
    lines += ["## Targets", "", *_targets(results)]
    for name, part in PARTS.items():
        if measured := results.of(name):
            lines += ["", f"## {name.capitalize()}", "", *part.table(measured)]
    if missing := {**results.failures, **({"the rest": stopped} if stopped else {})}:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {' '.join(why.split())[:300]}" for name, why in missing.items()]
    return "\n".join(lines) + "\n"


def _targets(results: Results) -> list[str]:
    """Return the lines of a table of the targets that could be measured."""
    lines = ["| target | measured | at most | |", "|---|---:|---:|---|"]
    for what, value, most in targets(results):
        lines.append(f"| {what} | {value:.2f} | {most:.2f} | {'reached' if value <= most else 'missed'} |")
    return lines


def targets(results: Results) -> list[tuple[str, float, float]]:
    """Return what each target is, its measured ratio and the largest ratio that reaches it."""
    return [*_decode_targets(results.of("engine")), *_tenant_targets(results), *_product_targets(results)]


def _decode_targets(measured: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    wanted = [
        ("decode, context 1024, batch 1", engine.LOSSLESS, engine.MERGED_COMPILED, "ms", 1.05),
        ("decode, context 1024, batch 1", engine.LOSSLESS, engine.UNMERGED, "ms", 0.25),
        ("decode, context 1024, batch 1", engine.LOSSLESS, engine.PEFT_COMPILED, "ms", 0.85),
        ("decode, context 32768, batch 1", engine.BALANCED, engine.PEFT_COMPILED, "ms", 0.66),
        ("decode, context 8192, batch 8", engine.BALANCED, engine.PEFT_COMPILED, "ms", 0.70),
        ("prefill, context 4096, batch 1", engine.LOSSLESS, engine.MERGED, "ms", 1.06),
        ("decode, context 32768, batch 1", engine.BALANCED, engine.LOSSLESS, "kv_bytes", 0.55),
        ("decode, context 32768, batch 1", engine.COMPACT, engine.UNMERGED, "ms", 0.34),
        ("decode, context 32768, batch 1", engine.COMPACT, engine.UNMERGED, "memory", 0.62),
    ]
    found = []
    for case, ours, other, key, most in wanted:
        of_methods = measured.get(f"7B, {case}", {})
        if key in of_methods.get(ours, {}) and of_methods.get(other, {}).get(key):
            what = {"ms": "time", "kv_bytes": "KV bytes", "memory": "memory above the weights"}[key]
            found.append(
                (f"7B, {case}, {what}, {ours} / {other}", of_methods[ours][key] / of_methods[other][key], most)
            )
    return found


def _tenant_targets(results: Results) -> list[tuple[str, float, float]]:
    ms = results.of("tenants").get("32 tenants, rank 64", {}).get("ms")
    if not ms:
        return []
    return [
        (f"32 tenants of rank 64, {name} / base", ms[f"ChunkWise {name}"] / ms[engine.BASE], most)
        for name, most in (("lossless", 1.30), ("half rank", 1.15))
    ]


def _product_targets(results: Results) -> list[tuple[str, float, float]]:
    found = []
    for rank, most in (("64", 0.9), ("8 to 128", 0.6)):
        ms = results.of("products").get(f"rank {rank}, 64 tokens, 32 adapters", {}).get("ms", {})
        if products.VLLM in ms:
            base = ms[products.BASE]
            ratio = (ms[products.OURS] - base) / (ms[products.VLLM] - base)
            found.append((f"adapters of rank {rank}, 64 tokens over 32 adapters, ours / vLLM", ratio, most))
    return found


def picture(results: Results) -> bytes:
    """Return a PNG image: one panel per decode case and one for the adapter products, ours in colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        f"{cell}\nms": {name: one["ms"] for name, one in of_methods.items()}
        for cell, of_methods in results.of("engine").items()
    }
    panels |= {f"{cell}\nms per step": result["ms"] for cell, result in results.of("tenants").items()}
    panels |= {
        f"{cell}\nµs per layer": {name: 1e3 * value for name, value in result["ms"].items()}
        for cell, result in [*results.of("products").items()][:8]
    }
    columns = 3
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.2 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, bars) in zip(axes, panels.items(), strict=False):
        _bars(axis, title, [*bars], [*bars.values()])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _bars(axis: Any, title: str, names: Sequence[str], values: Sequence[float]) -> None:
    colours = ["#d1410c" if name.startswith(("ours", "ChunkWise")) else "#6b6b6b" for name in names]
    axis.barh(range(len(names)), values, color=colours)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    for height, value in enumerate(values):
        axis.annotate(f"{value:.3g}", (value, height), (3, 0), textcoords="offset points", va="center", fontsize=7)
