"""The pages stay true: links lead somewhere, commands have the options that are shown, the README's example runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer

from chunkwise_lora.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("docs/settings.md", "docs/cli.md")
"""Pages of the site that docs/_build/pages.py writes. `make docs` checks links to their headings."""
PAGES = ["README.md", "CHANGELOG.md", "weights/README.md", "tests/small/MODEL_CARD.md", *DOCS]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OPTION = re.compile(r"-[a-z]|--[a-z][a-z0-9-]*")
OUTSIDE = {"--lora-modules", "--enable-lora"}
"""Options of vLLM's command that pages about this package's commands name."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> Iterator[list[str]]:
    """The shell commands in the code blocks and in the sentences of a page, as words."""
    blocks = [content for language, content in FENCED.findall(text_of(page)) if language == "sh"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for command in [*lines, *(" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text_of(page))))]:
        if re.match(r"(chunkwise|python|pytest|make) ", command):
            yield shlex.split(command, comments=True)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def subcommands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from subcommands(one)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text_of(page))):
        if re.match(r"https?:", target):
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if linked.resolve().relative_to(ROOT).as_posix() in GENERATED:
            continue
        assert linked.exists(), f"{page} links to {target}, which does not exist"
        assert not heading or heading in anchors(linked), f"{page} links to {target}, which is no heading there"


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_are_shown(page: str) -> None:
    for words in commands(page):
        shown = " ".join(words)
        options = [word.partition("=")[0] for word in words if OPTION.fullmatch(word.partition("=")[0])]
        if words[0] == "chunkwise":
            command: click.Command = typer.main.get_command(app)
            for word in words[1:]:
                found = getattr(command, "commands", {}).get(word)
                if found is None:
                    break
                command = found
            assert not hasattr(command, "commands") or len(words) == 2, f"{page}: no such command: {shown}"
            assert set(options) <= options_of(command), f"{page}: {shown}"
            continue
        files = [word for word in words if re.fullmatch(r"[\w./]+\.py", word)]
        assert all((ROOT / file).is_file() for file in files), f"{page}: no such file: {shown}"
        if words[0] == "python" and files:
            script = (ROOT / files[0]).read_text()
            for option in options:
                name = option.removeprefix("--").replace("-", "_")
                assert f'"{option}"' in script or re.search(rf"\b{name}: ", script), f"{page}: {option} in: {shown}"


@pytest.mark.parametrize("page", ["README.md", "docs/quality.md", "docs/research-notes.md", "docs/benchmarks.md"])
def test_options_named_in_sentences_exist(page: str) -> None:
    known = {name for command in subcommands(typer.main.get_command(app)) for name in options_of(command)} | OUTSIDE
    scripts = [path.read_text() for folder in ("training", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    for span in INLINE.findall(FENCED.sub("", text_of(page))):
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span):
            name = option.removeprefix("--").replace("-", "_")
            of_script = any(f'"{option}"' in script or re.search(rf"\b{name}: ", script) for script in scripts)
            assert option in known or of_script, f"{page}: {span}"


@pytest.mark.parametrize("page", PAGES)
def test_imports_in_examples_exist(page: str) -> None:
    for language, block in FENCED.findall(text_of(page)):
        for module, names in re.findall(r"^from (chunkwise_lora\S*) import (.+)$", block, re.MULTILINE):
            if "llama_cpp" in module and find_spec("llama_cpp") is None:
                pytest.skip("llama-cpp-python is not installed")
            if language == "python":
                for name in names.strip("()").split(", "):
                    found = import_module(module)
                    assert hasattr(found, name) or import_module(f"{module}.{name}"), f"{page}: {module} has no {name}"


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = [content for language, content in FENCED.findall(text_of("README.md")) if language == "python"]
    names: dict[str, object] = {}
    short = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", example)
    exec(compile(short, "README.md", "exec", dont_inherit=True), names)
    assert type(names["peft_model"]).__name__ == "PeftModelForCausalLM"
    ladders = names["ladders"]
    assert isinstance(ladders, dict) and list(ladders) == ["wiki", "e2e"]
