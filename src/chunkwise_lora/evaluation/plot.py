"""The plot of an evaluation: what is lost against the mean rank."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle, product
from typing import Any

from chunkwise_lora.evaluation.baselines import PLANS
from chunkwise_lora.evaluation.results import Evaluation, Result
from chunkwise_lora.evaluation.statistics import Estimate

STRONG = ("#d1410c", "#f08a24", "#b5126d", "#7a3ff2")
"""Colours of ChunkWise; the first one is that of the calibrated plans."""
GREYS = ("#6b6b6b", "#9a9a9a", "#b9b9b9")
"""Colours of baselines."""
_POWERS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)
"""Ticks of an axis that is linear around 0 and logarithmic further away."""
_PLACES = (
    (8, 0, "left"),
    (-8, 0, "right"),
    *((0, up, "center") for up in (14, -14, 24, -24, 34, -34, 44, -44)),
)
"""Where a name may stand: how far to the right of its point and above it (1/72 inch), and its alignment. The first
place without a collision is taken."""


def plot(evaluation: Evaluation) -> bytes:
    """A PNG image: the most important score, and the KL divergence, against the mean rank.

    Every series is a line with its name beside it. The base model is left out, because it is far away.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    score = evaluation.score
    scale = 1 if score.unit == "points" else 100

    def change(result: Result) -> Estimate:
        found = result.over_full[score.name]
        return Estimate(scale * found.value, scale * found.low, scale * found.high)

    compared = [one for one in evaluation.results if one.label.role in ("baseline", "ours") and one.mean_rank > 0]
    tolerance = scale * score.tolerance
    left.axhspan(-tolerance, tolerance, color="#e8f3ea", zorder=0)
    left.axhline(0, color="#444444", linewidth=0.8)
    left.text(0.01, 0, "full rank", transform=left.get_yaxis_transform(), fontsize=8, color="#444444", va="bottom")
    _draw(left, compared, change)
    farthest = max((abs(change(one).value) for one in compared), default=0)
    if farthest > 20 * tolerance:
        left.set_yscale("symlog", linthresh=4 * tolerance)
        left.yaxis.set_major_locator(FixedLocator([sign * power for power in _POWERS for sign in (1, -1)]))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if not score.higher_is_better:
        left.invert_yaxis()
    unit = "points" if score.unit == "points" else "%"
    left.set_ylabel(f"{score.name} against full rank, {unit}{'' if score.higher_is_better else ' (up is better)'}")
    distant = [one for one in compared if one.kl.value > 0]
    _draw(right, distant, lambda one: one.kl)
    right.set_yscale("log")
    right.set_ylabel("KL divergence from full rank, nats per token")
    for axes in (left, right):
        axes.set_xlabel(f"mean rank (full: {evaluation.full_rank:.3g})")
        lowest = min((one.mean_rank for one in compared if one.mean_rank > 0), default=1.0)
        axes.set_xscale("log")
        axes.set_xlim(0.8 * lowest, 1.25 * evaluation.full_rank)
        axes.xaxis.set_major_locator(FixedLocator([evaluation.full_rank / 2**halving for halving in range(10)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(y=0.08)
    figure.draw_without_rendering()
    for axes, results, value in ((left, compared, change), (right, distant, lambda one: one.kl)):
        _name(figure, axes, results, value)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _series(results: Sequence[Result]) -> dict[str, tuple[list[Result], str]]:
    """The results of each series by rising mean rank, and its colour. ChunkWise comes last, and so on top."""
    strong, greys = cycle(STRONG[1:]), cycle(GREYS)
    found: dict[str, tuple[list[Result], str]] = {}
    for role in ("baseline", "ours"):
        for result in sorted(results, key=lambda one: one.mean_rank):
            series = result.label.series
            if result.label.role == role and series not in found:
                colour = next(greys) if role == "baseline" else STRONG[0] if series == PLANS else next(strong)
                found[series] = ([one for one in results if one.label.series == series], colour)
                found[series][0].sort(key=lambda one: one.mean_rank)
    return found


def _draw(axes: Any, results: Sequence[Result], value: Callable[[Result], Estimate]) -> None:
    """A line with intervals for each series."""
    for of_series, colour in _series(results).values():
        ours = of_series[0].label.role == "ours"
        found = [value(one) for one in of_series]
        error = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
        axes.errorbar(
            [one.mean_rank for one in of_series],
            [one.value for one in found],
            [[max(0.0, low) for low in error[0]], [max(0.0, high) for high in error[1]]],
            color=colour,
            marker="o" if ours else "s",
            markersize=8 if of_series[0].label.series == PLANS else 5,
            linewidth=2.2 if ours else 1.2,
            elinewidth=0.8,
            capsize=2,
            zorder=3 if ours else 2,
        )


def _name(figure: Any, axes: Any, results: Sequence[Result], value: Callable[[Result], Estimate]) -> None:
    """Write the name of each series beside one of its points, where it covers no point and no other name."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    taken = []
    for result in results:
        x, y = axes.transData.transform((result.mean_rank, value(result).value))
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for series, (of_series, colour) in _series(results).items():
        text = axes.annotate(
            series if len(of_series) > 1 else of_series[0].name,
            (0, 0),
            (0, 0),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            fontweight="bold" if of_series[0].label.role == "ours" else "normal",
            va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        for result, (right, up, alignment) in product(of_series, _PLACES):
            text.xy = (result.mean_rank, value(result).value)
            text.set_horizontalalignment(alignment)
            text.set_position((right, up))
            extent = text.get_window_extent(figure.canvas.get_renderer())
            inside = axes.bbox.x0 < extent.x0 and extent.x1 < axes.bbox.x1
            if inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
