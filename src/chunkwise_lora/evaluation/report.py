"""Reports of an evaluation: Markdown, and an HTML page that needs no other file."""

from __future__ import annotations

import base64
import html

from chunkwise_lora.evaluation.plot import plot
from chunkwise_lora.evaluation.results import Evaluation, Result
from chunkwise_lora.evaluation.statistics import Estimate
from chunkwise_lora.evaluation.verdict import findings, verdict
from chunkwise_lora.rank_colour import rank_colour

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } tr.ours { font-weight: 600; }
.verdict { font-size: 1.2rem; }
.sample { line-height: 1.9; white-space: pre-wrap; border: 1px solid #ddd; padding: 1rem; }"""


def columns(evaluation: Evaluation, result: Result) -> dict[str, str]:
    """The cells of a result's table row, by column name, with 95% intervals in brackets."""
    cells = {"mean rank": f"{result.mean_rank:.2f}"}
    for score in evaluation.scores:
        form = ".1f" if score.unit == "points" else ".2f"
        cells[score.name] = _interval(result.scores[score.name], form)
        change = "+.2f" if score.unit == "points" else "+.2%"
        cells[f"{score.name} over full rank"] = _interval(result.over_full[score.name], change)
    return cells | {"KL to full rank": _interval(result.kl, ".4f"), "KV bytes": f"{result.kv_share:.0%}"}


def markdown(evaluation: Evaluation, image: str | None = None) -> str:
    """The report as Markdown, with the plot in the file `image` if it is given."""
    rows = [(result.name, columns(evaluation, result)) for result in evaluation.results]
    names = list(rows[0][1])
    table = [
        f"| {' | '.join(['method', *names])} |",
        f"|---{'|---:' * len(names)}|",
        *(f"| {' | '.join([name, *cells.values()])} |" for name, cells in rows),
    ]
    points = [f"- {sentence}" for sentence in findings(evaluation)]
    parts = [f"# {_title(evaluation)}", f"**{verdict(evaluation)}**", "\n".join(points)]
    parts += [f"![The loss against the mean rank]({image})"] if image is not None else []
    return "\n\n".join(part for part in [*parts, "\n".join(table), evaluation.how] if part) + "\n"


def page(evaluation: Evaluation) -> str:
    """The report as an HTML page; the plot is embedded."""
    rows = [(result, columns(evaluation, result)) for result in evaluation.results]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("method", *rows[0][1]))
    body = "".join(
        f'<tr class="{result.label.role}">'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in (result.name, *cells.values()))}</tr>"
        for result, cells in rows
    )
    points = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(evaluation))
    title = html.escape(_title(evaluation))
    image = base64.b64encode(plot(evaluation)).decode()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p class="verdict">{html.escape(verdict(evaluation))}</p>'
        f'{f"<ul>{points}</ul>" if points else ""}<img alt="The loss against the mean rank" '
        f'src="data:image/png;base64,{image}"><table><tr>{head}</tr>{body}</table>'
        f"<p>{html.escape(evaluation.how)}</p>{_sample(evaluation)}</html>\n"
    )


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.task}: {evaluation.score.name}"


def _sample(evaluation: Evaluation) -> str:
    if evaluation.sample is None:
        return ""
    pieces, ranks = evaluation.sample
    spans = []
    for piece, rank in zip(pieces, ranks, strict=True):
        colour = ",".join(map(str, rank_colour(rank / evaluation.full_rank)))
        spans.append(f'<span title="rank {rank:.1f}" style="background:rgb({colour})">{html.escape(piece)}</span>')
    heading = "<h2>The rank of each token</h2><p>Blue is a low rank, orange is a high rank.</p>"
    return f'{heading}<div class="sample">{"".join(spans)}</div>'


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
