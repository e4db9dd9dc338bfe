"""Tables and coloured text for the terminal: token ranks, ladders, calibrations and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from statistics import mean
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from chunkwise_lora.cli.output import is_ascii_only, shows_colours
from chunkwise_lora.errors import escaped_lines, shown
from chunkwise_lora.rank_colour import LEGEND, rank_colour, rank_shown

if TYPE_CHECKING:
    from chunkwise_lora.benchmark.llama_cpp import LlamaMeasurement
    from chunkwise_lora.benchmark.measure import Measurement
    from chunkwise_lora.benchmark.sample import SampleResult
    from chunkwise_lora.calibration.calibrate import Calibration
    from chunkwise_lora.evaluation.results import Evaluation
    from chunkwise_lora.ladder import RankLadder
    from chunkwise_lora.ladder.module import LadderModule
    from chunkwise_lora.method.trace import SequenceTrace


def coloured_tokens(
    sequence: SequenceTrace,
    pieces: Sequence[str],
    full_rank: float,
    prompt_tokens: int = 0,
    colours: bool | None = None,
) -> Text:
    """The text of a sequence. A token has the colour of its rank, a chunk begins with a bar, the prompt is italic.

    Where no colours are shown, ranks stand in brackets wherever they change.

    Args:
        sequence: The trace of the sequence.
        pieces: The text of each of its tokens.
        full_rank: The rank that has the strongest colour.
        prompt_tokens: How many of the tokens are the prompt.
        colours: Whether readers see colours; by default, whether the terminal shows them.
    """
    colours = shows_colours() if colours is None else colours
    starts = {chunk.chunk.start for chunk in sequence.chunks} - {0}
    text, rank_before = Text(), None
    for position, (piece, rank) in enumerate(zip(pieces, sequence.ranks, strict=True)):
        if position in starts:
            text.append(_bar(), style="bold red")
        if not colours and rank != rank_before:
            text.append(f"[{rank_shown(rank)}]")
            rank_before = rank
        share = rank / full_rank if full_rank else 0.0
        text.append(escaped_lines(piece), style=_style(share, italic=position < prompt_tokens))
    return text


def _style(share: float, italic: bool) -> Style:
    return Style(color="black", bgcolor=Color.from_rgb(*rank_colour(share)), italic=italic)


def _bar() -> str:
    """What stands where a chunk begins."""
    return "|" if is_ascii_only() else "│"


def rank_legend(full_rank: float, colours: bool | None = None) -> Text:
    """A legend of the colours of ranks from 0 to the full rank; see `coloured_tokens`."""
    if not (shows_colours() if colours is None else colours):
        return Text(f"[n] the next tokens have rank n of {rank_shown(full_rank)}   {_bar()} a chunk begins")
    text = Text("rank ")
    for share in LEGEND:
        text.append(f" {rank_shown(share * full_rank)} ", style=_style(share, italic=False))
    text.append("   ").append(_bar(), style="bold red").append(" a chunk begins   ")
    return text.append("the prompt is in italics", style="italic")


def ladder_table(ladder: RankLadder, every_module: bool = False, columns: int = 8) -> Table:
    """The singular values of modules, and the share of their squares that rungs keep.

    Args:
        ladder: The ladder.
        every_module: One row per module, instead of means over the modules of each type.
        columns: Largest number of rungs between the first and the last one that are shown, at even distances.
    """
    inner = range(1, len(ladder.rung_ranks) - 1)
    step = max(1, -(-len(inner) // columns))
    rungs = inner[(len(inner) - 1) % step :: step]  # the last one is always shown
    prefix = commonprefix(list(ladder.modules)).rpartition(".")[0]  # noqa: RUF071 - whole names: cut at the last dot
    table = Table(title=f"Rank ladder ({ladder.build}), energy kept per rung", box=SIMPLE_HEAD, padding=0)
    groups: dict[str, list[LadderModule]] = {}
    for name, module in ladder.modules.items():
        groups.setdefault(name.removeprefix(f"{prefix}.") if every_module else name.rpartition(".")[2], []).append(
            module
        )
    if every_module:
        table.add_column(Text(shown(f"{prefix}.", 60)) if prefix else "module", no_wrap=True)
    else:
        table.add_column("modules", no_wrap=True)
    table.add_column("r", justify="right")
    table.add_column("spectrum", no_wrap=True)
    for rung in rungs:
        table.add_column(rank_shown(ladder.rung_ranks[rung]), justify="right")
    for name, modules in groups.items():
        label = shown(name, 60) if every_module else f"{len(modules)} x {shown(name, 40)}"
        lowest, highest = (choose(module.rank for module in modules) for choose in (min, max))
        spectrum = [mean(values) for values in zip(*(_relative(module, highest) for module in modules), strict=True)]
        energies = [mean(module.energy(module.ranks[rung]) for module in modules) for rung in rungs]
        table.add_row(
            Text(label),
            f"{highest}" if lowest == highest else f"{lowest}-{highest}",
            sparkline(spectrum),
            *(f"{energy:.0%}" for energy in energies),
        )
    notes = [] if every_module else ["means over the modules of each type; --all shows every module"]
    if len(inner) > len(rungs):
        notes.append(f"{len(inner) - len(rungs)} more rungs: --json writes them")
    table.caption = "\n".join(notes) or None
    return table


def _relative(module: LadderModule, length: int) -> list[float]:
    """The singular values of a module as shares of the largest one, followed by zeros up to `length`."""
    values: list[float] = (module.sigma / module.sigma.max().clamp_min(1e-30)).tolist()
    return values + [0.0] * (length - len(values))


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Non-negative values as a row of at most `width` bars; the largest value has the highest bar."""
    bars = " .:-=+*#@" if is_ascii_only() else " ▁▂▃▄▅▆▇█"
    step = max(1, -(-len(values) // width))
    highest = max(values, default=0.0)
    return "".join(bars[round(8 * value / highest)] if highest else bars[0] for value in values[::step])


def calibration_table(result: Calibration) -> Table:
    """The share of the tokens' costs that each set of signals explains, and the rank of each difficulty level."""
    table = Table(title="How well signals predict which tokens need rank, on unseen text", box=SIMPLE_HEAD, padding=0)
    table.add_column("signals")
    table.add_column("deviance explained", justify="right")
    for name, share in result.explained.items():
        table.add_row(name, f"{share:.1%}")
    full = result.ladder.rung_ranks[-1]
    ranks = ", ".join(f"{share * full:.1f}" for share in result.policy.selection.rank_shares)
    length, scales = result.policy.chunking.min_length, result.policy.selection.scales
    table.caption = f"rank of every token: {ranks}; scale {scales[0]:g}"
    if len(scales) > 1:
        table.caption = (
            f"ranks from easy to hard: {ranks}; chunks of at least {length} tokens, scales {min(scales):g} to "
            f"{max(scales):g}"
        )
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per method. Differences to full rank stand with their 95% intervals; ChunkWise is bold."""
    first, *others = evaluation.scores
    points = first.unit == "points"
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=20)
    columns = ["mean\nrank", first.name.replace(" ", "\n"), "over full rank\n(95% interval)"]
    for column in [*columns, *(other.name for other in others), "KL", "KV"]:
        table.add_column(column, justify="right", no_wrap=True)
    for result in evaluation.results:
        change = result.over_full[first.name]
        low, high = (_change(value, points) for value in (change.low, change.high))
        is_full = result.label.role == "full"
        table.add_row(
            Text(shown(result.name, 60)),
            f"{result.mean_rank:.1f}",
            f"{result.scores[first.name].value:{'.1f' if points else '.2f'}}",
            "" if is_full else f"{_change(change.value, points)} ({low} to {high})",
            *(f"{result.scores[other.name].value:.1f}" for other in others),
            "" if is_full else f"{result.kl.value:.4f}",
            f"{result.kv_share:.0%}",
            style="bold" if result.label.role == "ours" else "",
        )
    return table


def _change(value: float, points: bool) -> str:
    """A difference with its sign, in points or as a percentage of at most four digits."""
    if points:
        return f"{value:+.1f}"
    return f"{value:+.{2 if abs(value) < 0.0995 else 1 if abs(value) < 0.995 else 0}%}"


def bench_table(results: Sequence[Measurement]) -> Table:
    """One row per measurement. The columns `x` are ratios to PEFT unmerged: medians over rounds."""
    several = len({(result.context, result.batch) for result in results}) > 1
    prefills = any(result.prefill_ms is not None for result in results)
    table = Table(title="Interleaved rounds; x: ratio to PEFT unmerged", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    columns = ["decode\nms/step", "x"]
    columns += ["prefill\nms", "x"] if prefills else []
    columns += ["adapter\nKB/step", "KV cache\nKB"]
    peaks = any(result.peak_bytes is not None for result in results)
    columns += ["peak\nMB"] if peaks else []
    for column in columns:
        table.add_column(column, justify="right")
    cell = None
    for result in results:
        if several and cell != (result.context, result.batch):
            cell = (result.context, result.batch)
            table.add_row(f"[bold]context {result.context:,}, batch {result.batch}[/]")
        row = [f"{result.decode_ms:.2f}", f"{result.decode_ratio:.2f}"]
        row += [_number(result.prefill_ms, ",.1f"), _number(result.prefill_ratio, ".2f")] if prefills else []
        row += [f"{result.adapter_bytes_per_pass / 1024:,.0f}", f"{result.kv_bytes / 1024:,.0f}"]
        if peaks:
            row.append(_number(None if result.peak_bytes is None else result.peak_bytes / 1e6, ",.0f"))
        table.add_row(Text(shown(result.name, 60)), *row)
    return table


def sample_table(results: Sequence[SampleResult]) -> Table:
    """One row per method on the sample. The column `x` is the ratio to PEFT unmerged."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    scores = list(results[0].scores)
    for column in (
        "ms per\ntoken",
        "x",
        "adapter\nKB read",
        "KV cache\nKB",
        *(name.replace(" ", "\n") for name in scores),
    ):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.decode_ms:.1f}",
            f"{result.decode_ratio:.2f}",
            f"{result.adapter_bytes_per_pass / 1024:,.0f}",
            f"{result.kv_bytes / 1024:,.0f}",
            *(f"{result.scores[name]:.1f}" for name in scores),
            style="bold" if result.name.startswith("ChunkWise") else "",
        )
    return table


def llama_table(results: Sequence[LlamaMeasurement]) -> Table:
    """One row per measurement of llama.cpp. Ratios are medians over rounds."""
    table = Table(title="llama.cpp, interleaved rounds", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for column in ("decode\nms/token", "x\nbase", "x own\nLoRA", "prompt\nms", "x\nbase", "x own\nLoRA"):
        table.add_column(column, justify="right")
    group = None
    for result in results:
        if (result.batch, result.context) != group:
            group = result.batch, result.context
            batch = "" if result.batch == 1 else f", batch {result.batch}"
            table.add_row(f"[bold]context {result.context:,}{batch}[/]")
        table.add_row(
            Text(shown(result.name, 60)),
            f"{result.decode_ms:.2f}",
            f"{result.decode_over_base:.2f}",
            f"{result.decode_over_own:.2f}",
            f"{result.prefill_ms:,.1f}",
            f"{result.prefill_over_base:.2f}",
            f"{result.prefill_over_own:.2f}",
        )
    return table


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
