"""The paper's table is measured cell by cell, and a run goes on where the last one stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import paper
import small
from chunkwise_lora import ChunkWiseError
from chunkwise_lora.ladder.contents import Expectation

QUESTION = {"question": "When?", "answers": [{"text": "1889"}]}
SQUAD = {"data": [{"paragraphs": [{"context": "The tower was built in 1889.", "qas": [QUESTION]}]}]}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """Options of a run with two tasks, each with one calibrated ladder."""
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    (tmp_path / "test.txt").write_text(" = Karsund = \n \n Karsund is a small town . \n")
    expectation = Expectation(asked_rank=8, mean_rank=8, loss_increase=0.01, loss_increase_error=0.005)
    replace(small.calibrated(), expectation=expectation).save_pretrained(tmp_path / "half")
    return {
        "data": [f"squad={tmp_path / 'dev.json'}", f"wikitext={tmp_path / 'test.txt'}"],
        "r16": [f"squad={small.WIKI}", f"wikitext={small.WIKI}"],
        "r8": [f"squad={small.E2E}"],
        "half": [f"squad={tmp_path / 'half'}"],
        "eighth": [f"wikitext={tmp_path / 'half'}"],
        "model": str(small.BASE),
        "out": tmp_path / "out",
        "context": 16,
        "new_tokens": 2,
        "rounds": 2,
    }


def test_a_table_has_every_cell_that_was_given(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    paper.main(**inputs)
    out = inputs["out"]
    told = json.loads((out / "paper.json").read_text())
    scores = {
        row: sorted({"perplexity", "exact match", "F1", "BLEU"} & set(told["table"][row])) for row in told["table"]
    }
    both = ["F1", "exact match", "perplexity"]
    everyone = dict.fromkeys(("base", "r16", *paper.TRUNCATED, "paper"), both)
    expected = {**everyone, "r8": ["F1", "exact match"], "half": ["F1", "exact match"], "eighth": ["perplexity"]}
    assert scores == expected
    assert told["table"]["base"]["adapter"]["value"] == 0 < told["table"]["paper"]["adapter"]["value"]
    assert told["quality"]["svd-quarter"]["squad"]["mean_rank"] == 4 and "half" in told["quality"]
    assert told["quality"]["svd-half"]["squad"]["kl"]["value"] < told["quality"]["svd-eighth"]["squad"]["kl"]["value"]
    assert "latency" in told["table"]["r8"] and "latency" in told["table"]["half"]
    assert "latency" not in told["table"]["eighth"]
    assert (out / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert all(paper.ROWS[row] in (out / "paper.md").read_text() for row in expected)

    measured: list[tuple[str, str]] = []

    def note(rows: list[str], task: str, *rest: Any) -> Any:
        measured.extend((row, task) for row in rows)
        return dict.fromkeys(rows, json.loads((out / "cells" / f"{task}-paper.json").read_text())["measured"])

    monkeypatch.setattr(paper, "quality", note)
    monkeypatch.setattr(paper, "latency", lambda *given: pytest.fail("latency was kept"))
    (out / "cells" / "squad-base.json").unlink()
    paper.main(**inputs)
    assert measured == [("base", "squad")], "all other cells were kept"
    paper.main(**inputs | {"limit": ["squad=1"], "rounds": 0})
    assert {task for _, task in measured[1:]} == {"squad"}, "a limit of one task"
    assert len(measured) == 1 + sum("F1" in one for one in expected.values())


def test_an_unknown_task_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(ChunkWiseError, match="--r8 chess: choose from wikitext, squad, e2e"):
        paper.main(**inputs | {"r8": ["chess=x/y"]})
    with pytest.raises(ChunkWiseError, match="--limit squad=few: give a number"):
        paper.main(**inputs | {"limit": ["squad=few"]})


def test_a_cell_shows_its_interval() -> None:
    assert paper.written(None) == ""
    assert paper.written({"value": 12.345}) == "12.35"
    assert paper.written({"value": 12.3, "low": 11.0, "high": 13.0}) == "12.30 (11.00 to 13.00)"
