"""Reports of an evaluation: an HTML page that needs no other file, and a Markdown table like the paper's."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkwise_lora.evaluation.answers import AnswersResult
from chunkwise_lora.evaluation.statistics import Estimate
from chunkwise_lora.evaluation.text import TextResult
from chunkwise_lora.rank_colour import rank_colour

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } img { max-width: 49%; }
.sample { line-height: 1.9; white-space: pre-wrap; border: 1px solid #ddd; padding: 1rem; }"""


@dataclass(frozen=True)
class Evaluation:
    """The results of one task."""

    title: str
    how: str
    """How the results were measured, in a few sentences."""
    metric: str
    """Name of the score that the plots compare, their vertical axis."""
    results: Sequence[TextResult] | Sequence[AnswersResult]
    sample: tuple[list[str], list[float], float] | None = None
    """Pieces of a text, one per token; the rank of each token; and the full rank."""


def columns(result: TextResult | AnswersResult) -> dict[str, str]:
    """The cells of a result's table row, by column name."""
    rank = "" if result.mean_rank is None else f"{result.mean_rank:.2f}"
    if isinstance(result, TextResult):
        return {
            "perplexity": _interval(result.perplexity, ".2f"),
            "per word": f"{result.perplexity_per_word:.1f}",
            "over full rank": _interval(result.increase, "+.2%"),
            "KL to full rank": _interval(result.kl, ".4f"),
            "mean rank": rank,
            "KV bytes": f"{result.kv_share:.0%}",
            "ms/token": "" if result.ms_per_token is None else f"{result.ms_per_token:.2f}",
        }
    scores = {}
    for name, score in result.scores.items():
        scores[name] = _interval(score, ".2f")
        scores[f"{name} over full"] = _interval(result.over_full[name], "+.2f")
    return {
        **scores,
        "KL to full rank": _interval(result.kl, ".4f"),
        "mean rank": rank,
        "KV bytes": f"{result.kv_share:.0%}",
        "ms/token": f"{result.ms_per_token:.2f}",
    }


def markdown(evaluation: Evaluation) -> str:
    """A table with one row per method and 95% intervals in brackets."""
    rows = [(result.name, columns(result)) for result in evaluation.results]
    names = list(rows[0][1])
    lines = [
        f"| {' | '.join(['method', *names])} |",
        f"|---{'|---:' * len(names)}|",
        *(f"| {' | '.join([name, *cells.values()])} |" for name, cells in rows),
    ]
    return f"## {evaluation.title}\n\n" + "\n".join(lines) + f"\n\n{evaluation.how}\n"


def page(evaluation: Evaluation) -> str:
    """An HTML page with table, plots and coloured sample; images are embedded."""
    rows = [(result.name, columns(result)) for result in evaluation.results]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("method", *rows[0][1]))
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (name, *cells.values()))}</tr>"
        for name, cells in rows
    )
    plots = "".join(f'<img alt="{label}" src="{image}">' for label, image in _plots(evaluation))
    title = html.escape(evaluation.title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(evaluation.how)}</p><table><tr>{head}</tr>{body}</table>"
        f"{plots}{_sample(evaluation)}</html>\n"
    )


def quality(result: TextResult | AnswersResult) -> Estimate:
    """The score that plots compare: perplexity, or the first score of the answers."""
    return result.perplexity if isinstance(result, TextResult) else next(iter(result.scores.values()))


def _plots(evaluation: Evaluation) -> list[tuple[str, str]]:
    from matplotlib.figure import Figure

    plots = []
    for label, of_result in (("mean rank", lambda r: r.mean_rank), ("KV bytes, share of full", lambda r: r.kv_share)):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes: Any = figure.add_subplot()
        for result in evaluation.results:
            if of_result(result) is None or result.name.startswith("base"):
                continue  # the base model's score is so far away that the other points would overlap
            value = quality(result)
            error = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
            ours = result.name.startswith("ChunkWise")
            axes.errorbar(of_result(result), value.value, error, marker="o" if ours else "x", label=result.name)
        axes.set_xlabel(label)
        axes.set_ylabel(evaluation.metric)
        axes.legend(fontsize=6)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        plots.append((label, f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"))
    return plots


def _sample(evaluation: Evaluation) -> str:
    if evaluation.sample is None:
        return ""
    pieces, ranks, full = evaluation.sample
    spans = []
    for piece, rank in zip(pieces, ranks, strict=True):
        colour = ",".join(map(str, rank_colour(rank / full)))
        spans.append(f'<span title="rank {rank:.1f}" style="background:rgb({colour})">{html.escape(piece)}</span>')
    heading = "<h2>The rank of each token</h2><p>Blue is a low rank, orange is a high rank.</p>"
    return f'{heading}<div class="sample">{"".join(spans)}</div>'


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
