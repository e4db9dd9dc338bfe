"""Draws the concepts with the package itself, on the small model of the tests.

The text is real: the model and its adapter generate it, and the drawings show how it was planned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import small
from chunkwise_lora import ChunkWiseConfig, RankLadder, RuntimeScheduler
from chunkwise_lora.engines.base import entropies_of
from chunkwise_lora.method.complexity import SIGNALS, TokenComplexityEstimator
from chunkwise_lora.method.config import CompositionConfig
from chunkwise_lora.method.segments import segments_of
from chunkwise_lora.rank_colour import rank_colour

BALANCED, COMPACT = ChunkWiseConfig.preset("balanced"), ChunkWiseConfig.preset("compact")
SHOWN = 40
"""Tokens in the drawings that name them."""
READ, LONG = 160, 2560
"""Tokens that the model reads, and tokens of the drawing of a long text."""
COLOURS = ("#4878a8", "#7aa874", "#c8b060", "#b07aa1")


@cache
def text() -> tuple[list[int], list[str], list[float | None]]:
    """Ids, words, and the entropy of the distribution that predicted each token; None for the first one."""
    model = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    ids = tokenizer(small.HELD_TEXT.read_text(), return_tensors="pt").input_ids[:, :READ]
    with torch.no_grad():
        entropies = entropies_of(model(ids).logits[0])
    words = [tokenizer.decode([token]).strip() or "¶" for token in ids[0].tolist()]
    return ids[0].tolist(), words, [None, *entropies[:-1].tolist()]


def scheduled(config: ChunkWiseConfig, tokens: int) -> tuple[RuntimeScheduler, np.ndarray]:
    """The scheduler after a number of tokens of the text, and the weights of its plan, (tokens, rungs)."""
    ids, _, entropies = text()
    scheduler = RuntimeScheduler(config, ladder().rung_ranks, small.VOCABULARY)
    return scheduler, scheduler.step(ids[:tokens], entropies[:tokens]).weights


@cache
def ladder() -> RankLadder:
    """The ladder of the small model's adapter."""
    return RankLadder.load(small.WIKI)


def colour(level: int, levels: int = 3) -> tuple[float, ...]:
    """The colour of a level: blue is easy, orange is hard."""
    return tuple(part / 255 for part in rank_colour(level / (levels - 1)))


def words_below(axis: Any) -> None:
    """Write the tokens below an axis."""
    axis.set_xticks(range(SHOWN), text()[1][:SHOWN], rotation=90, fontsize=7)
    axis.set_xlim(-0.6, SHOWN - 0.4)


def complexity() -> Figure:
    """What each signal contributes to the score of every token."""
    ids, _, entropies = text()
    estimator = TokenComplexityEstimator(BALANCED.complexity, small.VOCABULARY)
    weights = np.array([getattr(BALANCED.complexity, name) for name in SIGNALS])
    parts = np.zeros((len(SIGNALS), SHOWN))
    for place in range(SHOWN):
        values = estimator.signals(ids[place], entropies[place])
        known = np.array([value is not None for value in values])
        shares = np.array([value or 0.0 for value in values]) * weights
        parts[:, place] = shares / weights[known].sum()
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    below = np.zeros(SHOWN)
    for name, part, shade in zip(SIGNALS, parts, COLOURS, strict=True):
        axis.bar(range(SHOWN), part, bottom=below, color=shade, label=name)
        below += part
    axis.set(ylabel="complexity", ylim=(0, 1))
    axis.legend(ncols=4, loc="upper right", fontsize=8)
    words_below(axis)
    return figure


def chunks() -> Figure:
    """Scores, their running mean, the thresholds, and the chunks that they make."""
    scheduler, _ = scheduled(BALANCED, READ)
    ids, _, entropies = text()
    scores = TokenComplexityEstimator(BALANCED.complexity, small.VOCABULARY).update(ids, entropies)
    means, mean = [], 0.0
    for place, score in enumerate(scores):
        mean += (score - mean) / min(BALANCED.chunking.memory, place + 1)
        means.append(mean)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    for one in scheduler.chunks:
        end = one.chunk.end or READ
        axis.axvspan(one.chunk.start - 0.5, end - 0.5, color=colour(one.chunk.level), alpha=0.6, linewidth=0)
        axis.axvline(one.chunk.start - 0.5, color="white", linewidth=2)
    for threshold in BALANCED.chunking.thresholds:
        margin = BALANCED.chunking.hysteresis
        axis.axhspan(threshold - margin, threshold + margin, color="grey", alpha=0.35, linewidth=0)
    axis.plot(scores, "o", color="black", markersize=3, label="score")
    axis.plot(means, color="black", label="running mean")
    axis.set(xlabel="token", ylabel="complexity", xlim=(-0.5, READ - 0.5), ylim=(0, 1))
    axis.legend(ncols=2, loc="upper right", fontsize=8)
    return figure


def rank_ladder() -> Figure:
    """The singular values of one module, and its rungs."""
    name, module = next(iter(ladder().modules.items()))
    sigma = module.sigma.numpy()
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.bar(np.arange(1, len(sigma) + 1), sigma, color=COLOURS[0])
    kept = np.cumsum(sigma**2) / (sigma**2).sum()
    for rung, rank in enumerate(module.ranks[1:], 1):
        axis.axvline(rank + 0.5, color="grey", linewidth=1)
        axis.text(rank + 0.4, sigma[0], f"rung {rung}\n{kept[rank - 1]:.0%}", ha="right", va="top", fontsize=7)
    axis.set(
        xlabel="direction", ylabel="singular value", title=name.removeprefix("model."), xlim=(0.4, len(sigma) + 0.6)
    )
    axis.title.set_size(9)
    return figure


def cross_fade() -> Figure:
    """The weights of the rungs around a boundary, without and with a cross-fade."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    boundary = scheduled(BALANCED, SHOWN)[0].chunks[1].chunk.start
    around = range(boundary - 3, boundary + 6)
    for axis, window in zip(axes, (0, 2, 4), strict=True):
        config = BALANCED.model_copy(update={"composition": CompositionConfig(window=window)})
        weights = scheduled(config, SHOWN)[1][around.start : around.stop]
        below = np.zeros(len(weights))
        ranks = np.array(ladder().rung_ranks)[weights.any(axis=0)]
        for rung in np.flatnonzero(weights.any(axis=0)):
            rank = ladder().rung_ranks[rung]
            axis.bar(
                range(len(weights)),
                weights[:, rung],
                bottom=below,
                color=COLOURS[int(rank == max(ranks))],
                label=f"rank {rank:g}",
            )
            below += weights[:, rung]
        axis.set(title=f"window = {window}", xticks=[], xlabel="tokens")
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("weight of the rung")
    return figure


def kv_policy() -> Figure:
    """What the cache holds of a long text under `compact`."""
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    ids = (tokenizer(small.HELD_TEXT.read_text()).input_ids * 5)[:LONG]
    scheduler = RuntimeScheduler(COMPACT, ladder().rung_ranks, small.VOCABULARY)
    held = np.zeros(LONG)  # 0: full precision, 1: INT8, 2: dropped
    for decision in scheduler.step(ids).decisions:
        place = slice(decision.start, decision.end)
        held[place] = np.maximum(held[place], {"keep": 0, "int8": 1, "drop": 2}[decision.action])
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    axis = figure.subplots()
    shades = {"full precision": COLOURS[2], "INT8": COLOURS[0], "dropped": "#dddddd"}
    axis.imshow(held[None], aspect="auto", cmap=ListedColormap(list(shades.values())), vmin=0, vmax=2)
    axis.set(xlabel="position", yticks=[])
    figure.legend([Patch(color=one) for one in shades.values()], shades, ncols=3, loc="outside upper left", fontsize=8)
    return figure


def plan() -> Figure:
    """The plan of two sequences, and the segments of the pass that runs them."""
    _, weights = scheduled(BALANCED, SHOWN)
    rung_ranks = np.array(ladder().rung_ranks)
    constant = np.zeros((SHOWN // 2, len(rung_ranks)), np.float32)
    constant[:, -1] = 1
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    both = np.concatenate([weights, constant])
    axis.imshow(both.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    for name, first, of_one in (("a", 0, weights), ("b", SHOWN, constant)):
        rows = np.arange(first, first + len(of_one))
        for segment in segments_of(name, of_one, rung_ranks, rows):
            how = "one slice" if segment.weights is None else "gates per token"
            middle = first + len(of_one) / 2 - 0.5
            text_of = f"segment of adapter {name}: rank up to {rung_ranks[segment.rung]:g}, {how}"
            axis.text(middle, -1.6, text_of, ha="center", va="top", fontsize=8)
    axis.axvline(SHOWN - 0.5, color="black", linewidth=1)
    axis.set(ylabel="rung", xticks=[], title="weights of the rungs, token by token")
    axis.title.set_size(9)
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "complexity": complexity,
    "chunks": chunks,
    "ladder": rank_ladder,
    "cross-fade": cross_fade,
    "kv-policy": kv_policy,
    "plan": plan,
}


def draw(folder: Path) -> None:
    """Write all drawings as SVG files."""
    mpl.rcParams.update(
        {"svg.hashsalt": "chunkwise", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        drawing().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
