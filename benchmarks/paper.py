"""The table of the paper (arXiv 2601.21109) for your own adapters: latency, memory, perplexity, exact match, F1, BLEU.

    python benchmarks/paper.py --data wikitext=test.txt squad=dev.json e2e=test.csv --r8 squad=runs/squad-r8 ... \\
      --r16 squad=runs/squad ... --half squad=runs/squad-half ... --quarter ... --lowest ... --out runs/paper

Every option takes TASK=PATH once per task. What is not given stays empty in the table. Where --r16 is a ladder, the
paper's rule runs on its rungs. The quality of every row and task, and the latency, is kept as JSON in the output
folder: an interrupted run goes on with the next task, and only what is new is measured. The table is written to
`paper.md`, `paper.json` and `paper.png` there.

Latency is that of decoding one token at batch 1, after `--context` tokens of the data, with the adapters of `--speed`;
all rows take turns. It needs a quiet machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import ListCommand, dtype_named, named_paths
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.files import write_atomically
from chunkwise_lora.method.config import ChunkWiseConfig

PAPER_RULE = Path(__file__).with_name("paper.json")
ROWS = {
    "base": "base, no adapter",
    "r8": "LoRA r 8, static (PEFT)",
    "r16": "LoRA r 16, static (PEFT)",
    "svd-half": "plain SVD of r 16, a half",
    "svd-quarter": "plain SVD, a quarter",
    "svd-eighth": "plain SVD, an eighth",
    "paper": "ChunkWise, the paper's rule",
    "half": "ChunkWise calibrated, half of r 16",
    "quarter": "ChunkWise calibrated, a quarter",
    "eighth": "ChunkWise calibrated, an eighth",
    "lowest": "ChunkWise calibrated, lowest free rank",
}
"""The rows of the table by name."""
CALIBRATED = ("half", "quarter", "eighth", "lowest")
"""The rows of calibrated ladders."""
TRUNCATED = {"svd-half": 0.5, "svd-quarter": 0.25, "svd-eighth": 0.125}
"""The rows of plain SVD, every token at the same share of the rank."""
OURS = ("paper", *CALIBRATED)
COLUMNS = {
    "latency": "latency, ms/token",
    "kv": "KV cache in use, MB",
    "adapter": "adapter read, MB/token",
    "perplexity": "perplexity (WikiText)",
    "exact match": "exact match (SQuAD)",
    "F1": "F1 (SQuAD)",
    "BLEU": "BLEU (E2E)",
}
"""The columns of the table by name; the last four are scores."""
TASKS = {"wikitext": ("perplexity",), "squad": ("exact match", "F1"), "e2e": ("BLEU",)}
"""The scores of each task."""
Cell = dict[str, float]
"""`value`, and where there is an interval `low` and `high`."""


@dataclass(frozen=True)
class Inputs:
    """What the table is made from: for each task by name, a path."""

    model: str
    data: Mapping[str, str]
    folders: Mapping[str, Mapping[str, str]]
    """Adapters and ladders by row and task."""
    limits: Mapping[str, int]
    """Windows or examples by task; a task without a limit is measured on all of them."""
    dtype: str

    def of(self, row: str, task: str) -> dict[str, Any] | None:
        """What a row's quality on a task depends on; None if something was not given."""
        needed = {"r16", *({row} & set(self.folders))}
        paths = {name: self.folders[name].get(task) for name in sorted(needed)}
        if task not in self.data or None in paths.values():
            return None
        files = {"data": self.data[task], **paths}
        return {"model": self.model, **with_contents(files), "limit": self.limits.get(task), "dtype": self.dtype}


def with_contents(paths: Mapping[str, str | None]) -> dict[str, Any]:
    """The paths, each with a checksum of its files, so that a changed file is measured again."""
    found: dict[str, Any] = {}
    for name, path in paths.items():
        files = [one for one in sorted([Path(path or ""), *Path(path or "").glob("*")]) if one.is_file()]
        contents = [hashlib.file_digest(one.open("rb"), "sha256").hexdigest() for one in files]
        found[name] = [path, *contents]
    return found


def quality(rows: Sequence[str], task: str, inputs: Inputs, report: Any) -> dict[str, dict[str, Any]]:
    """Measure rows on one task, compared with r 16."""
    from chunkwise_lora.evaluation.baselines import PLAIN, Comparison, MethodSelection
    from chunkwise_lora.evaluation.methods import FULL
    from chunkwise_lora.evaluation.settings import EvaluationSettings
    from chunkwise_lora.evaluation.tasks import calibrated_ladder, run_task

    folders = {row: of_tasks[task] for row, of_tasks in inputs.folders.items() if task in of_tasks}
    ladders = {row: calibrated_ladder(folders[row]) for row in rows if row in CALIBRATED}
    truncated = {row: share for row, share in TRUNCATED.items() if row in rows}
    base, tokenizer = load_base_and_tokenizer(inputs.model)
    comparison = Comparison(base.to(dtype_named(inputs.dtype)), folders["r16"], ladders)
    selection = MethodSelection(
        ["calibrated"] if ladders else [],
        [*(["base"] if "base" in rows else []), *(["svd"] if truncated else [])],
        list(truncated.values()),
        peft={"r8": folders["r8"]} if "r8" in rows else {},
        configs={"paper": ChunkWiseConfig.from_json(PAPER_RULE.read_text())} if "paper" in rows else {},
    )
    settings = EvaluationSettings(inputs.limits.get(task))
    evaluation = run_task(task, inputs.data[task], comparison, selection, tokenizer, settings, report)
    names = {row: f"ChunkWise {row}" for row in OURS} | {"base": "base, no adapter", "r8": "r8", "r16": FULL}
    names |= {row: f"{PLAIN} at {share * evaluation.full_rank:.3g}" for row, share in truncated.items()}
    results = {one.name: asdict(replace(one, answers=[], prediction=None)) for one in evaluation.results}
    return {row: {"how": evaluation.how, "full_rank": evaluation.full_rank, **results[names[row]]} for row in rows}


def latency(task: str, inputs: Inputs, sizes: Mapping[str, int], report: Any) -> dict[str, dict[str, Cell]]:
    """Measure time and memory of all rows with the adapters of one task, in interleaved rounds."""
    import torch

    from chunkwise_lora.benchmark.measure import measure
    from chunkwise_lora.benchmark.methods import BASE, UNMERGED, methods
    from chunkwise_lora.ladder import RankLadder

    base, tokenizer = load_base_and_tokenizer(inputs.model)
    base = base.to(dtype_named(inputs.dtype))
    prompt = torch.tensor([tokenizer(text_of(task, inputs.data[task])).input_ids[: sizes["context"]]])
    rule = ChunkWiseConfig.from_json(PAPER_RULE.read_text())
    of_rows = {}
    for row, folders in {"r16": inputs.folders["r16"], **inputs.folders}.items():
        if task not in folders:
            continue
        ladder = RankLadder.load(folders[task])
        presets = {"paper": rule} if row == "r16" else {row: ladder.policy} if row in CALIBRATED else {}
        name = f"of {row}"  # PEFT cannot hold an adapter that is called half
        made = {one.name: one for one in methods(base, {name: folders[task]}, presets, ladders={name: ladder})}
        if row == "r16":
            of_rows |= {"base": made[BASE], "r16": made[UNMERGED], "paper": made["ChunkWise paper"]}
        else:
            of_rows[row] = made[f"ChunkWise {row}"] if presets else replace(made[UNMERGED], name=row)
    pieces = len(of_rows) * (sizes["rounds"] + 1)
    measured = measure(
        list(of_rows.values()),
        prompt,
        new_tokens=sizes["new_tokens"],
        rounds=sizes["rounds"],
        prefill_rounds=1,
        advance=report(pieces),
    )
    found = {}
    for (row, method), one in zip(of_rows.items(), measured, strict=True):
        kv_bytes = one.kv_bytes
        if method.chunkwise is not None:
            method.chunkwise.generate(prompt, max_new_tokens=4, do_sample=False, chunkwise_config=method.config)
            assert method.chunkwise.trace is not None
            kv_bytes = method.chunkwise.trace.kv_bytes
        low, high = (ratio * one.decode_ms / one.decode_ratio for ratio in one.decode_spread)
        found[row] = {
            "latency": {"value": one.decode_ms, "low": low, "high": high},
            "kv": {"value": kv_bytes / 1e6},
            "adapter": {"value": one.adapter_bytes_per_pass / 1e6},
        }
    return found


def text_of(task: str, data: str) -> str:
    """Text of the data, to measure latency on."""
    from chunkwise_lora.evaluation import data as data_sets

    if task == "wikitext":
        return data_sets.wikitext(data)
    return "\n".join(one.prompt for one in (data_sets.squad if task == "squad" else data_sets.e2e)(data))


def kept(path: Path, inputs: dict[str, Any]) -> Any:
    """What an earlier run measured from the same inputs; None if there is nothing."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return content["measured"] if content["inputs"] == inputs else None


def keep(path: Path, inputs: dict[str, Any], measured: Any) -> Any:
    """Keep a measurement for later runs; returns it."""
    write_atomically(path, (json.dumps({"inputs": inputs, "measured": measured}, indent=1) + "\n").encode())
    return measured


def markdown(
    table: Mapping[str, Mapping[str, Cell]], quality_of: Mapping[str, Mapping[str, Any]], how: list[str]
) -> str:
    """The table as Markdown, with intervals in brackets; below it what every row spent, and how far it is from r 16."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for row, cells in table.items():
        lines.append(f"| {ROWS[row]} | {' | '.join(written(cells.get(column)) for column in COLUMNS)} |")
    titles = [f"{task}: mean rank | KL from r 16 | KV bytes" for task in TASKS]
    lines += ["", f"| | {' | '.join(titles)} |", f"|---|{'---:|' * 3 * len(titles)}"]
    for row, tasks in quality_of.items():
        shown = [
            f"{one['mean_rank']:.2f} | {one['kl']['value']:.4f} | {one['kv_share']:.0%}" if one else " | | "
            for one in map(tasks.get, TASKS)
        ]
        lines.append(f"| {ROWS[row]} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {one}" for one in how) + "\n"


def written(cell: Cell | None) -> str:
    """A cell of the table."""
    if cell is None:
        return ""
    digits = 2 if abs(cell["value"]) < 100 else 0
    value = f"{cell['value']:.{digits}f}"
    return f"{value} ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})" if "low" in cell else value


def picture(table: Mapping[str, Mapping[str, Cell]]) -> bytes:
    """A PNG image: one panel per column, one line per row, ChunkWise in colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [column for column in COLUMNS if any(column in cells for cells in table.values())]
    figure = Figure(figsize=(3.2 + 2.1 * len(columns), 0.6 + 0.45 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for height, (row, cells) in enumerate(table.items()):
            if column not in cells:
                continue
            cell, ours = cells[column], row in OURS
            value = cell["value"]
            number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
            if row == "base" and column in sum(TASKS.values(), ()):
                # The base's scores are so far away that the other points would overlap.
                axes.text(0.03, height, number, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
                continue
            error = [[max(0.0, value - cell.get("low", value))], [max(0.0, cell.get("high", value) - value)]]
            colour = "#d1410c" if ours else "#6b6b6b"
            axes.errorbar(value, height, xerr=error, marker="o" if ours else "s", color=colour, capsize=2)
            axes.annotate(number, (value, height), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axes.set_title(COLUMNS[column].replace(" (", "\n(").replace(", ", "\n"), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0.25)
    panels[0].set_yticks(range(len(table)), [ROWS[row] for row in table])
    panels[0].set_ylim(len(table) - 0.5, -0.7)
    for label, row in zip(panels[0].get_yticklabels(), table, strict=True):
        label.set_color("#d1410c" if row in OURS else "#6b6b6b")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


NONE: list[str] = []


def folders_option(what: str) -> Any:
    """An option that takes a folder for each task."""
    return typer.Option(metavar="TASK=FOLDER", help=what)


def main(
    data: Annotated[list[str], typer.Option(metavar="TASK=FILE", help="The data of each task.")],
    r16: Annotated[list[str], folders_option("PEFT adapters of rank 16, or ladders made of them.")],
    r8: Annotated[list[str], folders_option("PEFT adapters of rank 8.")] = NONE,
    half: Annotated[list[str], folders_option("Ladders that are calibrated to mean rank 8.")] = NONE,
    quarter: Annotated[list[str], folders_option("Ladders that are calibrated to mean rank 4.")] = NONE,
    eighth: Annotated[list[str], folders_option("Ladders that are calibrated to mean rank 2.")] = NONE,
    lowest: Annotated[list[str], folders_option("Ladders calibrated to the lowest rank that costs nothing.")] = NONE,
    model: Annotated[str, typer.Option(help="The base model.")] = examples.BASE,
    out: Annotated[Path, typer.Option(help="The output folder.")] = Path("runs/paper"),
    limit: Annotated[
        list[str], typer.Option(metavar="TASK=NUMBER", help="Windows or examples of each task; by default all.")
    ] = NONE,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    speed: Annotated[str, typer.Option(help="The task whose adapters and data latency is measured with.")] = "squad",
    context: Annotated[int, typer.Option(min=8, help="Tokens before the timed ones.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per round.")] = 32,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of latency; 0 leaves it out.")] = 7,
) -> None:
    """Measure what is missing, and write the table."""
    given = {"r8": r8, "r16": r16, "half": half, "quarter": quarter, "eighth": eighth, "lowest": lowest}
    folders = {
        row: {task: str(examples.find(path)) for task, path in named_paths(f"--{row}", paths).items()}
        for row, paths in given.items()
    }
    limits = named_paths("--limit", limit)
    if bad := [task for task, number in limits.items() if not number.isdecimal() or int(number) < 1]:
        raise ChunkWiseError(f"--limit {bad[0]}={limits[bad[0]]}: give a number of windows or examples, at least 1")
    numbers = {task: int(number) for task, number in limits.items()}
    inputs = Inputs(model, named_paths("--data", data), folders, numbers, dtype)
    for option, tasks in {"data": inputs.data, "limit": numbers, **folders}.items():
        if unknown := set(tasks) - set(TASKS):
            raise ChunkWiseError(f"--{option} {min(unknown)}: choose from {', '.join(TASKS)}")
    table: dict[str, dict[str, Cell]] = {row: {} for row in ROWS}
    quality_of: dict[str, dict[str, Any]] = {row: {} for row in ROWS}
    how: dict[str, str] = {}
    with progress() as reports:
        for task, scores in TASKS.items():
            needed = {row: one for row in ROWS if (one := inputs.of(row, task)) is not None}
            paths = {row: out / "cells" / f"{task}-{row}.json" for row in needed}
            cells = {row: kept(paths[row], needed[row]) for row in needed}
            if missing := [row for row, cell in cells.items() if cell is None]:
                for row, measured in quality(missing, task, inputs, reports.begin(task)).items():
                    cells[row] = keep(paths[row], needed[row], measured)
            for row, cell in cells.items():
                table[row] |= {score: cell["scores"][score] for score in scores}
                quality_of[row][task] = cell
                how[task] = f"{task}: {cell['how']}"
        if rounds and speed in folders["r16"] and speed in inputs.data:
            sizes = {"context": context, "new_tokens": new_tokens, "rounds": rounds}
            files = {row: paths[speed] for row, paths in folders.items() if speed in paths}
            depends = {"model": model, "dtype": dtype, "task": speed, **sizes}
            depends |= with_contents({"data": inputs.data[speed], **files})
            path = out / "cells" / "latency.json"
            measured = kept(path, depends) or keep(
                path, depends, latency(speed, inputs, sizes, lambda pieces: reports.steps("latency", pieces))
            )
            for row, found in measured.items():
                table[row] |= found
            how["latency"] = (
                f"latency and memory: {dtype}, batch 1, the {speed} adapters, {context} tokens of their data, "
                f"interleaved rounds ({rounds}) of {new_tokens} tokens; in brackets the quartiles over rounds"
            )
    table = {row: cells for row, cells in table.items() if cells}
    quality_of = {row: tasks for row, tasks in quality_of.items() if tasks}
    text = markdown(table, quality_of, list(how.values()))
    write_atomically(out / "paper.md", text.encode())
    content = {"rows": ROWS, "table": table, "quality": quality_of, "how": how}
    write_atomically(out / "paper.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(out / "paper.png", picture(table))
    Console().print(text, markup=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(cls=ListCommand)(main)
    app()
