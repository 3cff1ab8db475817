"""What mkdocs does beyond reading docs/: measured tables, notebooks beside the pages, all public names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import nbaccel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PROGRAMS = "<!-- programs -->"
_TOLD = {"hangs": "debugging.md#what-it-costs"}
"""Pages with figures of programs that have left no file in benchmarks/results."""
_NAMES = re.compile(r"<!-- names: (.*?) -->")


def on_config(config: Any) -> Any:
    """A page that the navigation does not name yet stands at the end of the guides."""
    docs = Path(config.docs_dir)
    named = str(config.nav)
    new = [str(page.relative_to(docs)) for page in sorted(docs.rglob("*.md"))]
    guides = next(part["Guides"] for part in config.nav if "Guides" in part)
    guides.extend(page for page in new if f"'{page}'" not in named)
    return config


def on_files(files: Files, config: Any) -> Files:
    """The notebooks become part of the site, so that pages can link them."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in measured tables and docstrings; links that leave docs/ for the notebooks stay in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({up}../notebooks/", f"]({up}notebooks/")
    named = {name for found in _NAMES.findall(markdown) for name in found.split()}
    others = " ".join(sorted(set(nbaccel.__all__) - named))
    markdown = _NAMES.sub(lambda mark: _reference(others if mark[1] == "others" else mark[1]), markdown)
    return markdown.replace(_PROGRAMS, _programs()) if _PROGRAMS in markdown else markdown


def _reference(names: str) -> str:
    return "\n\n".join(f"::: {nbaccel._HOMES[name]}.{name}" for name in names.split())


def _programs() -> str:
    """A section for each benchmark that can be run: its own words, and its results where there are any."""
    sections = []
    for path in sorted((ROOT / "benchmarks").glob("*.py"), key=lambda path: (path.stem in _TOLD, path.stem)):
        code = path.read_text()
        if "__main__" in code:
            words = ast.get_docstring(ast.parse(code)) or ""
            sections.append(f"## {path.stem.capitalize()}\n\n{words}\n\n{_results(path.stem)}")
    return "\n\n".join(sections)


def _results(name: str) -> str:
    """What it wrote; else where its figures are told."""
    if (RESULTS / f"{name}.md").exists():
        return (RESULTS / f"{name}.md").read_text()
    if (RESULTS / f"{name}.txt").exists():
        return f"```\n{(RESULTS / f'{name}.txt').read_text()}```"
    page = _TOLD.get(name)
    return (
        f"Its figures: [{page.partition('.')[0]}]({page})."
        if page
        else "No figures of it are kept here: run it."
    )
