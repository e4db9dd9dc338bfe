"""MkDocs hooks: generated pages join the site, and links out of `docs` lead to pages that show the linked files.

They use nothing but MkDocs. `make docs` writes the generated pages first, in the environment that has the package.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
GENERATED = Path(os.environ.get("CHUNKWISE_SITE_PAGES", ROOT / "runs" / "site-pages"))
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
SHOWN = {".c", ".h", ".json", ".md", ".py"}
"""Files of a linked folder that get a page. Their text is shown without colours, which would take most of the time."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the generated pages, and a page for every file or folder outside of `docs` that a page links to."""
    if not (GENERATED / "settings.md").is_file():
        raise PluginError(f"{GENERATED} holds no pages; run `make docs`, which writes them first")
    for path in sorted(one for one in GENERATED.rglob("*") if one.is_file()):
        name = path.relative_to(GENERATED).as_posix()
        files.append(File(name, str(GENERATED), config.site_dir, config.use_directory_urls))
    for file in [one for one in files if one.is_documentation_page()]:
        for _, target, _ in LINK.findall(file.content_string):
            linked = _outside(file.src_uri, target)
            if linked is not None:
                _add(files, config, linked)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of `docs` to the pages of those files."""

    def moved(link: re.Match[str]) -> str:
        linked = _outside(page.file.src_uri, link[2])
        if linked is None:
            return link[0]
        target = posixpath.relpath(_source_page(linked), posixpath.dirname(page.file.src_uri))
        return f"{link[1]}{target})"

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(moved, markdown)


def _outside(page: str, target: str) -> str | None:
    """The path in the repository of a link that leads out of `docs`; None for other links."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).exists() else None


def _source_page(path: str) -> str:
    """The page of the site that shows a file or a folder of the repository."""
    return f"source/{path.replace('/.', '/').lstrip('.')}{'/index' if (ROOT / path).is_dir() else ''}.md"


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    """Add the page of a file or a folder, and of the files in the folder."""
    place = _source_page(path)
    if files.get_file_from_path(place) is not None:
        return
    head = "---\nsearch:\n  exclude: true\n---\n\n"
    whole = ROOT / path
    if whole.is_dir():
        members = sorted(one for one in whole.iterdir() if one.suffix in SHOWN and one.is_file())
        lines = [f"- [{one.name}]({one.name}.md)" for one in members]
        for one in members:
            _add(files, config, f"{path}/{one.name}")
        content = "\n".join(lines)
    else:
        content = f"``````text\n{whole.read_text()}\n``````"
    files.append(File.generated(config, place, content=f"{head}# `{path}`\n\n{content}\n"))
