"""The commands on the small model, called as a user calls them."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import typer
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ChunkWiseModel, RankLadder, __version__, examples
from chunkwise_lora.calibration import calibrate as procedure
from chunkwise_lora.calibration import cost_model
from chunkwise_lora.cli import generate as command_generate
from chunkwise_lora.cli import rendering
from chunkwise_lora.cli.app import EXAMPLES, app
from chunkwise_lora.cli.calibrate import AMBIGUOUS_LOSS
from chunkwise_lora.cli.generations import print_sequence
from chunkwise_lora.cli.options import share
from chunkwise_lora.cli.progress import Bars, Lines, in_words
from chunkwise_lora.cli.rendering import coloured_tokens, ladder_table, rank_legend
from chunkwise_lora.errors import escaped_lines
from chunkwise_lora.evaluation.data import encode
from chunkwise_lora.method.trace import SequenceTrace
from chunkwise_lora.rank_colour import rank_colour

TEXT = " = Karsund = \n \n Karsund is a small town on the north side of the island . \n"

CHUNKWISE = [sys.executable, "-m", "chunkwise_lora.cli"]


@pytest.fixture
def short_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of a few tokens, for `chunkwise demo`."""
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "wiki.txt").write_text(TEXT * 3)
    (folder / "e2e.csv").write_text("mr,ref\nname[Zizzi],Zizzi is a pub.\nname[Aldhaven],Aldhaven is cheap.\n")
    monkeypatch.setattr("chunkwise_lora.benchmark.sample.SAMPLE", folder)
    monkeypatch.setattr("chunkwise_lora.benchmark.sample.WINDOW", 40)


@pytest.mark.usefixtures("short_sample")
def test_demo_shows_ranks_and_compares(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladders = {name: tmp_path / name for name in ("e2e", "wiki")}
    small.calibrated(small.E2E).save_pretrained(ladders["e2e"])
    small.calibrated(small.WIKI).save_pretrained(ladders["wiki"])
    monkeypatch.setattr(examples, "ladders", lambda: ladders)
    code, out, err = run("demo", "--new-tokens", 4, "--rounds", 1, "--json", tmp_path / "demo.json")
    assert code == 0 and err.startswith("comparing with PEFT: 1 of ")
    assert "mean rank" in out and "Without an adapter" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    result = json.loads((tmp_path / "demo.json").read_text())
    assert [one["adapter"] for one in result["generations"]] == ["e2e", "wiki"]
    rows = {row["name"]: row for row in result["comparison"]}
    assert list(rows) == [
        "base, no adapter",
        "PEFT merged",
        "PEFT unmerged",
        "ChunkWise lossless",
        "ChunkWise calibrated",
    ]
    base, merged, unmerged, lossless, calibrated = rows.values()
    assert base["adapter_bytes_per_pass"] == merged["adapter_bytes_per_pass"] == 0
    assert lossless["adapter_bytes_per_pass"] == unmerged["adapter_bytes_per_pass"]
    assert 0 < calibrated["adapter_bytes_per_pass"] < unmerged["adapter_bytes_per_pass"]
    assert lossless["scores"] == pytest.approx(unmerged["scores"], rel=1e-4)
    assert set(base["scores"]) == {"BLEU", "perplexity"}
    assert calibrated["kv_bytes"] < lossless["kv_bytes"] == unmerged["kv_bytes"]


@pytest.mark.usefixtures("short_sample")
def test_demo_runs_a_folder_with_a_plain_adapter_by_the_preset_balanced(run: Any, tmp_path: Path) -> None:
    for folder in (small.BASE, small.WIKI):
        (tmp_path / folder.name).symlink_to(folder)
    code, out, _ = run("demo", "--folder", tmp_path, "--new-tokens", 4, "--rounds", 1)
    assert code == 0 and "One prompt" in out and "ChunkWise balanced" in out and "BLEU" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "abacus"), "choose transformers or llama-cpp"),
        (("--engine", "llama-cpp", "--folder", "x"), "--folder is only for --engine transformers"),
        (("--engine", "llama-cpp", "--dtype", "float32"), "--dtype is only for --engine transformers"),
        (("--folder", "no/such"), "holds none of the adapters squad, e2e, wiki"),
    ],
)
def test_demo_refuses_options_that_do_not_fit(run: Any, options: tuple[str, ...], message: str) -> None:
    code, _, err = run("demo", *options)
    assert code == 1 and message in " ".join(err.split())


def test_demo_without_ladders_says_how_to_install_them(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "ladders", dict)
    code, _, err = run("demo")
    assert code == 1 and "pip install 'chunkwise-lora[examples]'" in " ".join(err.split())


def test_generate_writes_its_trace(run: Any, tmp_path: Path) -> None:
    arguments = ("generate", "--prompt", TEXT, "--max-new-tokens", 8, "--preset", "compact")
    code, plain, _ = run(*arguments)
    assert code == 0 and "rank" not in plain
    code, coloured, _ = run(*arguments, "--show-ranks", "--json", tmp_path / "out.json")
    assert code == 0 and "mean rank" in coloured
    content = json.loads((tmp_path / "out.json").read_text())
    (result,) = content["generations"]
    assert result["adapter"] == "wiki" and "wiki, mean rank" in coloured
    assert 0 < content["kv_bytes"] <= content["kv_bytes_full"] and content["adapter_bytes_read"] > 0
    assert result["text"].strip() in plain
    assert len(result["ranks"]) == len(result["tokens"])
    assert 0 < result["mean_rank"] < 16


def test_generate_takes_settings_from_a_file(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "settings.json"
    config.write_text(ChunkWiseConfig.preset("lossless").to_json())
    code, *_ = run("generate", "--prompt", TEXT, "--max-new-tokens", 2, "--config", config, "--json", tmp_path / "o")
    assert code == 0 and json.loads((tmp_path / "o").read_text())["generations"][0]["mean_rank"] == 16


def test_the_coloured_text_becomes_a_picture(run: Any, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    command = ("generate", "--prompt", "a town", "--preset", "balanced", "--max-new-tokens", 4)
    assert run(*command, "--picture", picture)[0] == 0
    content = picture.read_text()
    red, green, blue = rank_colour(14 / 16)
    assert content.startswith("<svg") and f"#{red:02x}{green:02x}{blue:02x}" in content and "mean&#160;rank" in content


def test_several_prompts_and_adapters_run_in_one_batch(run: Any, tmp_path: Path) -> None:
    command = ("generate", "--max-new-tokens", 4, "--json", tmp_path / "out.json")
    twin = shutil.copytree(small.WIKI, tmp_path / "wiki")
    for arguments, expected in (
        (("--prompt", "a", "--adapter", "wiki", "e2e"), [("a", "wiki"), ("a", "e2e")]),
        (("--prompt", "a", "b"), [("a", "wiki"), ("b", "wiki")]),
        (("--prompt", "a", "b", "--adapter", "e2e", "wiki"), [("a", "e2e"), ("b", "wiki")]),
        (("--prompt", "a", "--adapter", "wiki", twin), [("a", "wiki"), ("a", "wiki-2")]),
    ):
        code, out, _ = run(*command, *arguments)
        found = json.loads((tmp_path / "out.json").read_text())["generations"]
        assert code == 0 and [(one["prompt"], one["adapter"]) for one in found] == expected
        alone = [
            run("generate", "--max-new-tokens", 4, "--prompt", text, "--adapter", name) for text, name in expected[:1]
        ]
        assert found[0]["text"].strip() in alone[0][1] and found[0]["text"].strip() in out


def test_a_text_is_sampled_with_a_seed(run: Any) -> None:
    command = ("generate", "--prompt", TEXT, "--max-new-tokens", 12)
    greedy, hot, again, other = (
        run(*command, *options)[1].splitlines()[0]
        for options in (
            (),
            ("--temperature", 2, "--seed", 1),
            ("--temperature", 2, "--seed", 1),
            ("--temperature", 2, "--seed", 2),
        )
    )
    assert hot == again and len({greedy, hot, other}) == 3


def test_the_model_runs_in_the_number_format_and_on_the_device_that_are_asked_for(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, str]] = []

    def record(model: ChunkWiseModel, *rest: Any, **options: Any) -> dict[str, Any]:
        seen.append((model.base.dtype, model.base.device.type))
        return {}

    monkeypatch.setattr(command_generate, "print_generations", record)
    assert run("generate", "--prompt", "a", "--dtype", "bfloat16", "--device", "cpu")[0] == 0
    assert seen == [(torch.bfloat16, "cpu")]
    code, _, err = run("generate", "--prompt", "a", "--device", "tpu")
    assert code == 1 and "--device tpu: this machine has cpu" in err


COMMANDS_WITH_JSON = [
    ("generate", "--prompt", "a", "--max-new-tokens", 2, "--show-ranks"),
    ("ladder", "show", "wiki"),
    ("bench", "--contexts", 16, "--rounds", 1, "--prefill-rounds", 1, "--new-tokens", 2, "--presets", "lossless"),
]


@pytest.mark.parametrize("command", COMMANDS_WITH_JSON, ids=lambda command: command[0])
def test_json_alone_goes_to_standard_output(run: Any, command: tuple[Any, ...]) -> None:
    code, out, err = run(*command, "--json", "-")
    assert code == 0 and json.loads(out) and len(err.splitlines()) > 3
    assert run("ladder", "show", "wiki")[1], "the next command prints as usual"


def test_without_colours_ranks_are_numbers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("generate", "--prompt", "a town", "--preset", "balanced", "--max-new-tokens", 4, "--show-ranks")
    code, out, _ = run(*command)
    assert code == 0 and "[n] the next tokens have rank n of 16" in out and "[14]a town" in out
    monkeypatch.setattr(rendering, "shows_colours", lambda: True)
    assert "rank  0  4  8  12  16 " in run(*command)[1]


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii", "COLUMNS": "12"}, {"NO_COLOR": "1"}], ids=str)
def test_no_terminal_is_too_poor(environment: dict[str, str]) -> None:
    options = ("--model", str(small.BASE), "--adapter", str(small.WIKI), "--max-new-tokens", "4", "--show-ranks")
    command = [*CHUNKWISE, "generate", "--prompt", "Übung", *options]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"chunk begins" in b" ".join(done.stdout.split())


def test_a_closed_pipe_ends_a_command_without_a_traceback() -> None:
    show = shlex.join([*CHUNKWISE, "ladder", "show", str(small.WIKI), "--all"])
    done = subprocess.run(["bash", "-c", f"{show} | head -n 1"], capture_output=True, text=True, check=False)
    assert done.stdout and "Traceback" not in done.stderr


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    command = [*map(os.fsencode, CHUNKWISE), b"generate", b"--prompt", b"a\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 1 and b"is not UTF-8 text" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_shows_an_example_that_it_understands(run: Any, name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0 and EXAMPLES[name].replace(" ", "") in "".join(out.split())
    first, *words = shlex.split(EXAMPLES[name])
    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    assert first == "chunkwise" and words[: len(name.split())] == name.split()
    command.make_context(name, words[len(name.split()) :])


def test_a_ladder_is_built_from_data_and_shown(run: Any, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 40)
    folder = tmp_path / "ladder"
    code, out, _ = run("ladder", "build", "wiki", "-o", folder, "--base", small.BASE, "--calibration-text", text)
    assert code == 0 and "data-aware" in out
    assert RankLadder.from_pretrained(folder).build == "data-aware"
    code, out, _ = run("ladder", "show", folder, "--json", tmp_path / "show.json")
    assert code == 0 and "6 x q_proj" in out and "self_attn" not in out
    assert "0.self_attn.q_proj" in run("ladder", "show", folder, "--all")[1]
    shown = json.loads((tmp_path / "show.json").read_text())
    assert all(module["energy"] == sorted(module["energy"]) for module in shown["modules"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", ""), "empty"),
        (("generate", "--prompt", "a", "--preset", "fast"), "lossless, balanced, compact"),
        (("generate", "--prompt", "a", "--preset", "compact", "--config", "x.json"), "only one of them"),
        (("generate", "--prompt", "a", "--config", "no/such.json"), "no/such.json"),
        (("generate", "--prompt", "a", "--adapter", "no/such"), "no/such"),
        (("generate", "--prompt", "a", "--model", "no/such"), "no/such"),
        (("generate", "--prompt", "a", "--adapter", "[/bold]"), "[/bold]"),
        (("generate", "--prompt", "a", "--preset", "[red]"), "'[red]'"),
        (("generate", "--prompt", "a", "--preset", ""), "lossless, balanced, compact"),
        (("ladder", "show", "no/such"), "no/such"),
        (("ladder", "show", "x" * 300), "no such folder"),
        (("ladder", "build", "x" * 300, "-o", "y"), "no such folder"),
        (("ladder", "build", "wiki", "-o", "x", "--base", "y"), "--calibration-text"),
        (("ladder", "build", "wiki", "-o", "x", "--dtype", "int4"), "bfloat16"),
        (("ladder", "build", "wiki", "-o", "x", "--as-trained", "--base", "y", "--calibration-text", "z"), "leave out"),
    ],
)
def test_an_error_is_one_clear_line(run: Any, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1
    assert message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_an_empty_path_is_not_the_current_folder(
    run: Any, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("ladder", "build", "wiki", "-o", "ladder", option, "")
    assert code == 2 and option in err and "the path is empty" in err
    assert not list(tmp_path.iterdir())


def test_a_folder_for_the_results_is_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    code, _, err = run("ladder", "build", "wiki", "-o", tmp_path / "ladder", "--json", tmp_path)
    assert code == 1 and f"--json {tmp_path}: is a folder" in err
    assert not list(tmp_path.iterdir())


def test_a_ladder_of_many_rungs_fits_the_terminal(run: Any, tmp_path: Path) -> None:
    small.calibrated().save_pretrained(tmp_path)
    code, out, _ = run("ladder", "show", tmp_path)
    assert code == 0 and max(len(line) for line in out.splitlines()) <= 80
    assert "…" not in out and "7 more rungs" in out


def test_blank_lines_at_the_end_of_a_text_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    sequence = SequenceTrace("wiki", tokens=(1, 2, 3, 4), ranks=(8.0,) * 4, full_rank=16.0, chunks=())
    print_sequence(sequence, ["a\n", "b", "\n", " \n"], prompt_tokens=1)
    assert len(capsys.readouterr().out.splitlines()) == 4, "a frame around two lines"


def test_ranks_are_rounded_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "shows_colours", lambda: True)
    assert rank_legend(15.9).plain.startswith("rank  0  4  8  11.9  15.9 ")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_refused_by_name(run: Any, tmp_path: Path, damage: bytes) -> None:
    base = shutil.copytree(small.BASE, tmp_path / "base")
    (base / "tokenizer.json").write_bytes(damage)
    code, _, err = run("generate", "--prompt", "a", "--model", base)
    assert code == 1 and f"{base}: its tokenizer" in err
    assert len(err.strip().splitlines()) == 1


def test_json_can_be_written_to_a_pipe(run: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code, *_ = run("generate", "--prompt", "a", "--max-new-tokens", 1, "--json", pipe)
    os.close(reader)
    assert code == 0 and pipe.is_fifo()


def test_a_calibration_text_that_is_too_short_is_refused(run: Any, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXT)
    code, _, err = run(
        "ladder", "build", "wiki", "-o", tmp_path / "x", "--base", small.BASE, "--calibration-text", text
    )
    assert code == 1 and "short.txt" in err and "512" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("demo",),
        ("generate",),
        ("calibrate",),
        ("eval",),
        ("bench",),
        ("serve",),
        ("ladder",),
        ("ladder", "build"),
        ("ladder", "show"),
        ("ladder", "export"),
        ("ladder", "measure"),
    ],
)
def test_every_command_has_help(run: Any, command: tuple[str, ...]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage" in out


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from chunkwise_lora.cli.app import app; app(['calibrate', '--help'], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command_and_tells_its_version() -> None:
    command = [sys.executable, "-m", "chunkwise_lora.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"chunkwise-lora {__version__}\n"


@pytest.mark.parametrize(
    ("written", "value"),
    [("50%", 0.5), ("0.5", 0.5), ("50", 0.5), ("0.5%", 0.005), ("1", 1), ("100", 1), ("100%", 1), (" 25 % ", 0.25)],
)
def test_a_share_is_written_with_or_without_a_percent_sign(written: str, value: float) -> None:
    assert share("--mean-rank", written) == pytest.approx(value)


@pytest.mark.parametrize("written", ["", "%", "half", "0", "0%", "-5%", "-0.5", "101", "150%", "nan", "inf", "0,5%"])
def test_an_invalid_share_is_refused_with_the_remedy(written: str) -> None:
    with pytest.raises(ChunkWiseError, match=r"--mean-rank .*: write a percentage"):
        share("--mean-rank", written)


def test_an_ambiguous_loss_increase_is_refused() -> None:
    for written in ("0.5", "1", "0.1"):
        with pytest.raises(ChunkWiseError, match="write the percent sign"):
            share("--max-loss-increase", written, AMBIGUOUS_LOSS)
    assert share("--max-loss-increase", "0.005", AMBIGUOUS_LOSS) == 0.005
    assert share("--max-loss-increase", "2", AMBIGUOUS_LOSS) == 0.02


MISTYPED = pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a", "--adapter", "wikki"),
        ("bench", "--adapter", "wikki"),
        ("eval", "--task", "wikitext", "--data", "x", "--adapter", "wikki"),
        ("eval", "--task", "wikitext", "--data", "x", "--calibrated", "wikki"),
        ("eval", "--task", "wikitext", "--data", "x", "--peft", "r8=wikki"),
        ("calibrate", "--text", "x", "-o", "y", "--mean-rank", "50%", "--adapter", "wikki"),
        ("ladder", "build", "wikki", "-o", "x"),
        ("ladder", "show", "wikki"),
        ("ladder", "export", "wikki", "-o", "x"),
    ],
    ids=" ".join,
)


@MISTYPED
def test_a_mistyped_adapter_is_refused_with_the_closest_name(run: Any, command: tuple[str, ...]) -> None:
    code, _, err = run(*command)
    assert code == 1 and "Did you mean wiki?" in err and "owner/name" in err


def test_a_mistyped_adapter_is_refused_before_a_model_is_loaded_or_a_hub_asked() -> None:
    commands = [list(command) for command in MISTYPED.args[1]]
    code = (
        "import sys; from chunkwise_lora.cli.app import app; from chunkwise_lora.errors import LadderError\n"
        f"for command in {commands!r}:\n"
        "    try:\n"
        "        app(command, standalone_mode=False)\n"
        "    except LadderError as error:\n"
        "        print('wiki?' in str(error), [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True []"] * len(commands)


def test_a_folder_with_an_unusual_name_is_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikki").mkdir()
    monkeypatch.chdir(tmp_path)
    assert examples.find("wikki") == "wikki"
    assert examples.find("owner/name") == "owner/name"


def test_without_a_terminal_progress_is_printed_in_lines() -> None:
    written: list[str] = []
    seconds = iter([0.0, 0.0, 1.0, 40.0, 41.0, 100.0])
    with Lines(written.append, lambda: next(seconds)) as reports:
        assert list(reports.track([7, 8, 9, 10], description="working")) == [7, 8, 9, 10]
    assert written == ["working ...\n", "working: 2 of 4 after 40 s\n", "working: 4 of 4 after 1 min 40 s\n"]


def test_work_of_several_stages_is_printed_as_a_share_of_all_work() -> None:
    written: list[str] = []
    seconds = iter([1.0, 20.0, 101.0, 126.0])
    with Lines(written.append, lambda: next(seconds)) as reports:
        report = reports.overall()
        for stage, done in (("reading", 0), ("reading", 5), ("reading", 20), ("checking", 25)):
            report(stage, done, 50)
    assert written == [
        "reading: 0% of all work is done\n",
        "reading: 40% of all work is done, about 2 minutes left\n",
        "checking: 50% of all work is done, about 2 minutes left\n",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(9, "less than a minute"), (70, "about a minute"), (670, "about 11 minutes"), (7300, "about 2 hours")],
)
def test_a_length_of_time_is_said_in_plain_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_stage_that_never_begins_prints_nothing() -> None:
    written: list[str] = []
    with Lines(written.append) as reports:
        reports.steps("working", 3)
    assert written == []


def test_a_progress_bar_does_not_change_redirected_output(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    with Bars(Console(file=terminal, force_terminal=True)) as reports:
        for _ in reports.track(range(3), description="[red]working"):
            print("result")
    assert "[red]working" in terminal.getvalue() and "result" not in terminal.getvalue()
    assert capsys.readouterr().out == "result\n" * 3


def test_text_from_files_and_models_cannot_control_the_terminal() -> None:
    evil = "\x1b[2J[bold]\u202etext[/nonsense]"
    modules = list(RankLadder.load(small.WIKI).modules.values())
    sequence = SequenceTrace(evil, tokens=(1,), ranks=(8.0,), full_rank=8.0, chunks=())
    console = Console(width=200, file=io.StringIO(), record=True, force_terminal=True)
    console.print(ladder_table(RankLadder({f"{evil}.a": modules[0], f"{evil}.b": modules[1]}), every_module=True))
    console.print(coloured_tokens(sequence, [evil], full_rank=16))
    printed = console.export_text()
    assert printed.count("[bold]") == 2 and printed.count("[/nonsense]") == 2
    assert "\x1b" not in printed and "\u202e" not in printed
    assert escaped_lines("a\n\tb\x07") == "a\n\tb\\x07"


def test_a_path_is_printed_unchanged(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "[red]x[/red]"
    code, out, _ = run("ladder", "build", "wiki", "-o", folder)
    assert code == 0 and "[red]x[/red]" in out


def test_bench_takes_lists_and_writes_numbers_and_a_picture(run: Any, tmp_path: Path) -> None:
    lists = ("--contexts", 16, 24, "--batch", 1, 2, "--presets", "lossless", "balanced")
    quick = ("--rounds", 1, "--prefill-rounds", 1, "--new-tokens", 2, "--dtype", "float32")
    code, out, err = run("bench", *lists, *quick, "--plot", tmp_path / "b.png", "--json", tmp_path / "b.json")
    assert code == 0, err
    result = json.loads((tmp_path / "b.json").read_text())
    rows = [(row["context"], row["batch"], row["name"]) for row in result["results"]]
    assert {row[:2] for row in rows} == {(16, 1), (24, 1), (16, 2), (24, 2)}
    assert {"base, no adapter", "PEFT unmerged", "ChunkWise lossless", "ChunkWise balanced"} <= {row[2] for row in rows}
    assert "threads" in result["machine"] and "context 24, batch 2" in out
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_bench_times_random_weights_and_an_adapter_per_sequence(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from chunkwise_lora.benchmark import shapes
    from models import build

    monkeypatch.setitem(shapes.SHAPES, "135M", build("llama").config)
    options = (
        "--random-weights",
        "135M",
        "--adapters",
        2,
        "--batch",
        2,
        "--contexts",
        16,
        "--methods",
        "ChunkWise",
    )
    quick = ("--rounds", 1, "--prefill-rounds", 0, "--new-tokens", 2, "--slow", "kernels", "products")
    code, _, err = run("bench", *options, *quick, "--json", tmp_path / "b.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [row["name"] for row in rows if not row["name"].startswith("ChunkWise")] == [
        name for name in (row["name"] for row in rows) if name.startswith("PEFT unmerged")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--random-weights", "9B"), "choose one of 135M"),
        (("--adapters", 3), "needs --random-weights"),
        (("--slow", "brakes"), "choose from kernels, attention, products"),
        (("--presets", "fastest"), "preset 'fastest' is unknown"),
        (("--dtype", "int4"), "choose one of float32"),
        (("--device", "abacus"), "this machine has cpu"),
        (("--contexts", 1000), "has 1024 positions"),
    ],
)
def test_bench_refuses_unknown_values(run: Any, options: tuple[Any, ...], message: str) -> None:
    code, _, err = run("bench", *options)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def _logits_in_peft(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing weights
        return PeftModel.from_pretrained(base, str(folder)).eval()(tokens).logits


@pytest.fixture
def ragged(tmp_path: Path) -> RankLadder:
    """A saved ladder. On its middle rung the modules differ in rank, and some have rank 0."""
    ladder = RankLadder.load(small.WIKI)
    importance = {
        name: module.sigma.square() * 10 ** (i % 5) for i, (name, module) in enumerate(ladder.modules.items())
    }
    ladder = ladder.sorted_by(importance, 8)
    ladder = replace(ladder, rung_divergence=tuple(0.08 - 0.01 * rung for rung in range(9)))
    ladder.save_pretrained(tmp_path / "ladder")
    ranks = {module.ranks[4] for module in ladder.modules.values()}
    assert 0 in ranks and len(ranks) > 2
    return ladder


def test_an_exported_rung_gives_the_same_logits_in_peft(run: Any, tmp_path: Path, ragged: RankLadder) -> None:
    half, file = tmp_path / "half", tmp_path / "small.json"
    code, out, _ = run("ladder", "export", tmp_path / "ladder", "--mean-rank", "50%", "-o", half, "--json", file)
    assert code == 0 and f"PeftModel.from_pretrained(base, {str(half)!r})" in out
    assert "KL divergence" in out and "0.0400 nats" in " ".join(out.split())
    report = json.loads(file.read_text())
    assert report["kl"] == pytest.approx(0.04) and 0.5 < report["energy_kept"] < 1
    assert report["after"]["nbytes"] == pytest.approx(report["before"]["nbytes"] / 2, rel=0.02)
    assert (half / "adapter_model.safetensors").stat().st_size == pytest.approx(report["after"]["nbytes"], rel=0.05)
    assert sorted(path.name for path in half.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tokens = torch.randint(3, 500, (1, 20))
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32).eval()
    with ChunkWiseModel(base, ragged, ChunkWiseConfig.uniform(0.5)) as model, torch.no_grad():
        expected = model(tokens).logits
    assert torch.allclose(_logits_in_peft(half, tokens), expected, atol=2e-4)


def test_an_export_at_one_rank_has_no_patterns(run: Any, tmp_path: Path, ragged: RankLadder) -> None:
    for mean_rank, rank in (("50", 8), ("100%", 16), ("1%", 1)):
        code, *_ = run(
            "ladder", "export", tmp_path / "ladder", "--mean-rank", mean_rank, "--one-rank", "-o", tmp_path / "small"
        )
        assert code == 0
        config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
            rank,
            rank,
            {},
            {},
        )
        assert len(RankLadder.from_peft(tmp_path / "small").modules) == len(ragged.modules)


def test_a_measured_ladder_tells_its_loss_when_it_is_exported(run: Any, tmp_path: Path) -> None:
    measured, file = tmp_path / "measured", tmp_path / "measured.json"
    code, out, err = run(
        *("ladder", "measure", "wiki", "--text", small.HELD_TEXT, "--tokens", 512, "-o", measured, "--json", file)
    )
    assert code == 0, err
    assert "512 tokens" in " ".join(out.split())
    told = json.loads(file.read_text())
    divergence = told["rung_divergence"]
    assert divergence == sorted(divergence, reverse=True) and divergence[-1] == 0 < divergence[-2]
    assert RankLadder.load(measured).rung_divergence == pytest.approx(divergence)
    code, out, _ = run("ladder", "export", measured, "--mean-rank", "50%", "-o", tmp_path / "small")
    assert code == 0 and f"{divergence[told['rung_ranks'].index(8)]:.4f} nats" in " ".join(out.split())


def test_prompts_without_answers_cannot_be_measured_on(run: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("mr\nname[The Eagle]\n")
    code, _, err = run(
        *("ladder", "measure", "e2e", "--task", "e2e", "--text", tmp_path / "prompts.csv", "-o", tmp_path / "out")
    )
    assert code == 1 and "prompts.csv" in err and "no answer" in err


def test_a_plain_adapter_is_exported_in_its_own_number_format(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("ladder", "export", "wiki", "-o", tmp_path, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and "nothing is lost" in out
    assert report["before"] == report["after"] and report["after"]["dtype"] == "float16"
    tokens = torch.randint(3, 500, (1, 20))
    assert torch.allclose(_logits_in_peft(tmp_path, tokens), _logits_in_peft(small.WIKI, tokens), atol=0.05)


def test_an_export_does_not_replace_its_source(run: Any, tmp_path: Path) -> None:
    assert run("ladder", "export", "wiki", "-o", tmp_path)[0] == 0
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    code, _, err = run("ladder", "export", tmp_path, "--mean-rank", "50%", "-o", tmp_path)
    assert code == 1 and "give another folder" in " ".join(err.split())
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_calibrate_stops_at_ctrl_c_and_the_same_command_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT * 60)
    command = ("calibrate", "--text", text, "-o", folder, "--model", small.BASE, "--adapter", "wiki", "--mean-rank")
    command += ("50%", "--quick", "--tokens", 400, "--block", 32, "--refinements", 1, "--dtype", "float16")
    monkeypatch.setattr(cost_model, "MIN_STEPS", 10)
    with monkeypatch.context() as patch:
        patch.setattr(procedure, "choose_chunks_and_scale", Mock(side_effect=KeyboardInterrupt))
        code, out, err = run(*command)
    assert code == 130 and "Calibration takes" in out and not folder.exists()
    assert err.splitlines()[-1] == f"Stopped. Run the same command to go on, or delete {folder}.unfinished."
    assert "rotating the basis: " in err
    code, out, err = run(*command)
    assert code == 0 and "goes on where it stopped" in " ".join(out.split()) and "rotating the basis" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out"}
    ladder = RankLadder.load(folder)
    assert ladder.policy is not None
    assert {module.up.dtype for module in ladder.modules.values()} == {torch.float16}


def test_a_build_does_not_replace_a_calibrated_ladder(run: Any, tmp_path: Path) -> None:
    small.calibrated().save_pretrained(tmp_path)
    code, _, err = run("ladder", "build", "wiki", "-o", tmp_path)
    assert code == 1 and "calibrated" in err
    assert RankLadder.load(tmp_path).policy is not None


def test_an_unknown_method_is_refused(run: Any) -> None:
    code, _, err = run("bench", "--methods", "fast", "--rounds", 1)
    assert code == 1 and "--methods fast" in err and "PEFT merged" in " ".join(err.split())


def test_an_export_does_not_replace_a_ladder(run: Any, tmp_path: Path) -> None:
    assert run("ladder", "build", small.WIKI, "-o", tmp_path)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = run("ladder", "export", tmp_path, "--mean-rank", "50%", "-o", tmp_path)
    assert code == 1 and "give another folder" in " ".join(err.split())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_calibrate_chooses_and_checks_on_the_held_text(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanings = [f"name[{name}], area[{area}]" for name in ("Aldhaven", "Zizzi", "The Vaults") for area in "abcdefghi"]
    for name, answer, rows in (("learn", "It is a pub.", meanings), ("held", "Good.", meanings[:6])):
        (tmp_path / f"{name}.csv").write_text("mr,ref\n" + "".join(f'"{one}",{answer}\n' for one in rows))
    command = ("calibrate", "--task", "e2e", "--text", tmp_path / "learn.csv", "--held-text", tmp_path / "held.csv")
    command += ("--model", small.BASE, "--adapter", small.E2E, "--mean-rank", "50%", "--refinements", 0)
    monkeypatch.setattr(cost_model, "MIN_STEPS", 10)
    code, _, err = run(*command, "--tokens", 600, "-o", tmp_path / "out", "--json", tmp_path / "report.json")
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    _, answer = encode(AutoTokenizer.from_pretrained(small.BASE), "", "Good.")
    assert report["check"]["tokens"] == 3 * len(answer), "half of the held meanings"
