"""What mkdocs does beyond reading docs/: measured tables, notebooks beside the pages, all public names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import nbaccel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARK = re.compile(r"<!-- results: (\w+) -->")
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
    return _MARK.sub(_results, markdown)


def _reference(names: str) -> str:
    return "\n\n".join(f"::: {nbaccel._HOMES[name]}.{name}" for name in names.split())


def _results(mark: re.Match[str]) -> str:
    path = RESULTS / f"{mark[1]}.md"
    if not path.exists():
        raise PluginError(f"{path} is missing: copy it from build/bench after `make bench`")
    return path.read_text()
