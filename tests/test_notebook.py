"""The notebook runs, and its stored outputs have the form of those that it produces."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")

import nbformat
from nbclient import NotebookClient

import small

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after a run with the small model and a plain PEFT adapter, which need no other package."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"base_folder, adapter = {str(small.BASE)!r}, {str(small.WIKI)!r}"
    folder = str(tmp_path_factory.mktemp("notebook"))
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()


def forms(notebook: Any) -> list[list[Any]]:
    """What each cell puts out, without what depends on the model: kinds of data, tags of HTML, words of text."""
    found: list[list[Any]] = []
    for cell in notebook.cells:
        found.append([cell.cell_type])
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":  # warnings of other packages
                continue
            data = dict(output.get("data", {"text": output.get("text")}))
            page = data.get("text/html", "")
            found[-1] += [output.output_type, sorted(data), sorted(set(re.findall(r"<(\w+)(?: (\w+)=)?", page)))]
            found[-1] += [re.findall(r"[a-z_]{3,}", data.get("text", ""))]
    return found


def test_the_notebook_runs_and_its_stored_outputs_are_current(stored: Any, executed: Any) -> None:
    assert forms(stored) == forms(executed)


def test_the_stored_outputs_show_ranks_in_colour(stored: Any) -> None:
    first, second = [
        output.data["text/html"]
        for cell in stored.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert len(set(re.findall(r'title="rank (.*?)"', first))) > 1
    assert re.search(r"wiki: mean rank [78]\.?\d? of 16", second)
