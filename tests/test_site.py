"""The pages of the site that the package writes itself hold everything that they are about."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

from chunkwise_lora.calibration import CalibrationConfig
from chunkwise_lora.cli.app import app
from test_docs import options_of, subcommands

BUILD = Path(__file__).parents[1] / "docs" / "_build"


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BUILD))
    try:
        import pages

        yield pages
    finally:
        sys.path.remove(str(BUILD))


def test_every_setting_is_on_the_page_of_settings(pages: ModuleType) -> None:
    page = pages.settings_page()
    for model in (*pages.SETTINGS.values(), CalibrationConfig):
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in page and (field.description is None or pages.cell(field.description) in page)


def test_the_notebook_is_a_page_with_its_outputs(pages: ModuleType) -> None:
    page = pages.notebook_page()
    cells = json.loads(pages.NOTEBOOK.read_text())["cells"]
    assert page.count("\n```python\n") == sum(cell["cell_type"] == "code" for cell in cells)
    assert page.count("a chunk begins") == 2 and "](../docs" not in page and "GitHub" not in page


def test_every_option_of_every_command_is_on_the_page_of_commands(pages: ModuleType) -> None:
    page = pages.cli_page()
    commands = [one for one in subcommands(typer.main.get_command(app)) if not hasattr(one, "commands")]
    assert page.count("\n## chunkwise ") == len(commands) > 8
    for one in commands:
        section = next(part for part in page.split("\n## chunkwise ") if part.partition("\n")[0].endswith(one.name))
        assert all(name in section for name in options_of(one) - {"--help"})
