"""Writes the pages and drawings of the site that come from the package itself.

    python docs/_build/pages.py runs/site-pages

It imports the package, so it runs in an environment that has it. MkDocs, which needs no such environment, then takes
the files from this folder (see hooks.py).
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chunkwise_lora.calibration.config import CalibrationConfig
from chunkwise_lora.cli.app import app
from chunkwise_lora.method.config import (
    PRESETS,
    ChunkingConfig,
    ChunkWiseConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"

SETTINGS: dict[str, type[BaseModel]] = {
    "complexity": ComplexityConfig,
    "chunking": ChunkingConfig,
    "selection": SelectionConfig,
    "composition": CompositionConfig,
    "kv_cache": KVCacheConfig,
    "kv_cache.levels": LevelKVPolicy,
}
"""The parts of `ChunkWiseConfig` by their names in JSON."""


def cell(text: object) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def bounds(field: FieldInfo) -> str:
    """The allowed values of a setting, as far as its declaration tells them."""
    found = []
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            found.append(f"from {limit.ge:,}")
        elif isinstance(limit, annotated_types.Gt):
            found.append(f"above {limit.gt:,}")
        elif isinstance(limit, annotated_types.Le):
            found.append(f"to {limit.le:,}")
        elif isinstance(limit, annotated_types.Lt):
            found.append(f"below {limit.lt:,}")
    return " ".join(found)


def default_of(field: FieldInfo) -> str:
    """The default of a setting, as JSON shows it."""
    value = field.get_default()
    if value is None:
        return "null"
    if isinstance(value, tuple) and value and isinstance(value[0], LevelKVPolicy):
        return "; ".join(level.precision for level in value)
    return str(list(value) if isinstance(value, tuple) else value)


def fields_of(model: type[BaseModel]) -> str:
    """A table of the fields of a config."""
    rows = [
        [f"`{name}`", f"`{cell(default_of(field))}`", cell(bounds(field)), cell(field.description or "")]
        for name, field in model.model_fields.items()
    ]
    return table(["name", "default", "allowed", "meaning"], rows)


def settings_page() -> str:
    """All settings, from the fields that declare them."""
    page = [
        "# Settings\n\nAll settings of the method and of calibration. This page is made from the declarations in the "
        "package. An unknown name or a value that is not allowed is refused with a `ConfigError` that names it.\n\n"
        "## The method: ChunkWiseConfig\n\nA config has five parts. The defaults are the preset `balanced`. "
        '`ChunkWiseConfig.preset("balanced").to_json()` prints a whole config, and `ChunkWiseConfig.from_json` reads '
        "one. [Which preset to choose](guides/presets.md).\n\n"
    ]
    for name, model in SETTINGS.items():
        page.append(f"### {name}\n\n{model.__doc__}\n\n{fields_of(model)}")
    assert set(ChunkWiseConfig.model_fields) <= set(SETTINGS)
    page.append("## The presets\n\n")
    for name, config in PRESETS.items():
        page.append(f"### {name}\n\n```json\n{config.to_json()}```\n\n")
    page.append(
        "## Calibration: CalibrationConfig\n\nThe options of `chunkwise calibrate` have the same names. "
        f"[How to calibrate](guides/calibrate.md).\n\n{fields_of(CalibrationConfig)}"
    )
    return "".join(page)


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below a command, with their full names."""
    if hasattr(command, "commands"):
        for sub, one in command.commands.items():
            yield from commands(one, f"{name} {sub}")
    else:
        yield name, command


def cli_page() -> str:
    """All commands with their options, from the command line's own declarations."""
    page = [
        "# Command line\n\nThis page is made from the commands. Every command also explains itself with `--help`. "
        "An error is one line on standard error, and the exit status is then 1.\n\n"
    ]
    for name, command in commands(typer.main.get_command(app), "chunkwise"):
        context = typer.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        records = [record for one in command.params if (record := one.get_help_record(context))]
        rows = [[f"`{cell(option)}`", cell(meaning)] for option, meaning in records]
        help_text = inspect.cleandoc(command.help or "").replace("\x08", "")
        if command.epilog:
            help_text += "\n\n" + inspect.cleandoc(command.epilog)
        page.append(f"## {name}\n\n```text\n{name} {usage}\n```\n\n{help_text}\n\n{table(['option', 'meaning'], rows)}")
    return "".join(page)


def notebook_page() -> str:
    """The notebook with its stored outputs."""
    page = []
    for one in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(one["source"])
        if one["cell_type"] == "code":
            page.append(f"```python\n{source}\n```")
            page += [output_of(output) for output in one["outputs"]]
        elif "github" not in one["metadata"].get("tags", ()):
            page.append(source.replace("](../docs/", "]("))
    return "\n\n".join(page) + f"\n\nThis page is `{NOTEBOOK.relative_to(ROOT)}` in the repository.\n"


def output_of(output: dict[str, Any]) -> str:
    """An output of a cell: HTML, or else text."""
    data = output.get("data", {})
    if "text/html" in data:
        return "".join(data["text/html"])
    return f"```text\n{''.join(data.get('text/plain', output.get('text', ''))).rstrip()}\n```"


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "notebook.md": notebook_page}
"""The pages by the names of their files."""


def write(folder: Path) -> None:
    """Write all pages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
