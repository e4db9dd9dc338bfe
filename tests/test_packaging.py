"""What the distributions hold, and what the files around them say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import chunkwise_lora
from chunkwise_lora import examples

ROOT = Path(__file__).parents[1]


def wheel_of(project: Path, folder: Path) -> ZipFile:
    """Build the wheel of a project."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return ZipFile(wheel)


def text_in(wheel: ZipFile, ending: str) -> str:
    """The text of the only file whose name ends so."""
    [name] = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_the_wheel_holds_the_package_and_its_types(tmp_path: Path) -> None:
    with wheel_of(ROOT, tmp_path) as wheel:
        held = set(wheel.namelist())
        source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
        kept = {name for name in source if "__pycache__" not in name}
        assert kept <= held and "chunkwise_lora/py.typed" in held
        assert {name.partition("/")[0] for name in held - kept} == {
            f"chunkwise_lora-{chunkwise_lora.__version__}.dist-info"
        }
        points = text_in(wheel, "entry_points.txt")
        assert "chunkwise = chunkwise_lora.cli:main" in points and "[vllm.general_plugins]" in points
        metadata = text_in(wheel, "METADATA")
        assert f"Version: {chunkwise_lora.__version__}\n" in metadata and "License-Expression: Apache-2.0" in metadata


def test_the_wheel_of_the_examples_holds_ladders_and_nothing_else(tmp_path: Path) -> None:
    with wheel_of(ROOT / "weights", tmp_path) as wheel:
        held = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert {name.split("/")[1] for name in held if name.count("/") > 1} == set(examples.LADDERS)
        assert {Path(name).suffix for name in held} <= {".json", ".md", ".py", ".safetensors"}


def test_the_version_stands_in_one_place_and_is_cited() -> None:
    assert f"version: {chunkwise_lora.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert not re.search(r"^version = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    commands = [line.strip().removeprefix("$(BIN)/") for line in check.splitlines()[1:]]
    assert [" ".join(command.split()[:2]) for command in commands if "mypy" not in command] == [
        " ".join(hook.split()[:2]) for hook in hooks if "mypy" not in hook
    ]
    assert "mypy" in commands and "mypy" in hooks
