"""What mkdocs does beyond reading docs/: measured tables, notebooks beside the pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARK = re.compile(r"<!-- results: (\w+) -->")


def on_files(files: Files, config: Any) -> Files:
    """The notebooks become part of the site, so that pages can link them."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in measured tables; links that leave docs/ for the notebooks stay in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({up}../notebooks/", f"]({up}notebooks/")
    return _MARK.sub(_results, markdown)


def _results(mark: re.Match[str]) -> str:
    path = RESULTS / f"{mark[1]}.md"
    if not path.exists():
        raise PluginError(f"{path} is missing: copy it from build/bench after `make bench`")
    return path.read_text()
