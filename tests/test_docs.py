"""The pages stay true: links lead somewhere, commands have the options that are shown, the README's example runs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer

import small
from chunkwise_lora.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
MEASURED = ("README.md", "docs/quality.md", "docs/research-notes.md", "docs/benchmarks.md")
GUIDES = [page for page in DOCS if page.startswith("docs/guides/")]
GENERATED = ("docs/settings.md", "docs/cli.md", "docs/notebook.md")
"""Pages of the site that docs/_build/pages.py writes. `make docs` checks links to their headings."""
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "weights/README.md",
    "tests/small/MODEL_CARD.md",
    *DOCS,
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OPTION = re.compile(r"-[a-z]|--[a-z][a-z0-9-]*")
OUTSIDE = {"--lora-modules", "--enable-lora"}
"""Options of vLLM's command that pages about this package's commands name."""


OF_ENGINES = re.compile(r"engines\.llama_cpp|ladder\.gguf|from openai")
"""In blocks that need another engine or a server, which the tests of that engine run."""
MESSAGES = "docs/troubleshooting.md"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def examples_of(page: str) -> list[str]:
    """The blocks of Python of a page, with short answers."""
    blocks = [content for language, content in FENCED.findall(text_of(page)) if language == "python"]
    return [re.sub(r"max_(new_)?tokens=\d+", r"max_\1tokens=4", block) for block in blocks]


def run_blocks(page: str, blocks: list[str]) -> dict[str, object]:
    """Run blocks of a page one after another, and return the names that they define."""
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)
    return names


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
        generated = linked.resolve().relative_to(ROOT).as_posix()
        if generated in GENERATED or generated.startswith("docs/drawings/"):
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


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quality.md", "docs/research-notes.md", "docs/benchmarks.md", *GUIDES]
)
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


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [content for language, content in FENCED.findall(text_of("README.md")) if language == "python"]
    names: dict[str, object] = {}
    short = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", example)
    exec(compile(short, "README.md", "exec", dont_inherit=True), names)
    assert type(names["peft_model"]).__name__ == "PeftModelForCausalLM"
    assert capsys.readouterr().out.count("Karsund is a town") == 2, "the texts of both adapters"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with the models, adapters and files that the examples of the pages name."""
    (tmp_path / "path/to").mkdir(parents=True)
    for name, place in {"base": small.BASE, "adapter": small.WIKI, "other": small.E2E}.items():
        (tmp_path / "path/to" / name).symlink_to(place)
    small.calibrated().save_pretrained(tmp_path / "calibrated")
    questions = [
        {"question": "The town is", "choices": ["large", "small"], "answer": number % 2} for number in range(4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    monkeypatch.chdir(tmp_path)


ELSEWHERE = ("docs/extending.md", "docs/research-notes.md")
"""Pages whose examples run in test_extending.py, or leave out arguments; test_training.py runs what those show."""
WITH_EXAMPLES = [
    page for page in DOCS if page not in ELSEWHERE and any(not OF_ENGINES.search(one) for one in examples_of(page))
]


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_the_examples_of_a_page_run(page: str) -> None:
    blocks = [block for block in examples_of(page) if not OF_ENGINES.search(block)]
    for module in ("bitsandbytes", "lm_eval"):
        if any(module in block or "BitsAndBytes" in block for block in blocks):
            pytest.importorskip(module)
    run_blocks(page, blocks)


def messages() -> list[str]:
    """The texts in the package's code, with "…" for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    known = messages()
    shown = re.findall(r"^\| `(.+?)` \| ", text_of(MESSAGES).partition("## It runs, but")[0], re.MULTILINE)
    for message in shown:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.fullmatch(one) for one in known), f"no message of the package: {message}"
    assert len(shown) > 50
