"""Execute notebooks in a real Jupyter kernel, show what their cells print, keep what they leave.

python notebooks/execute.py notebooks/quickstart.ipynb --out build    # leaves a notebook and a page there
python notebooks/execute.py notebooks/*.ipynb --in-place              # stores the outputs where they are
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

CELL_TIMEOUT = 600.0
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def main() -> int:
    """Execute each notebook named on the command line; 1 if a cell of one failed."""
    parser = argparse.ArgumentParser(description="Execute notebooks in a real Jupyter kernel.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the executed notebook and an HTML page of it")
    where.add_argument("--in-place", action="store_true", help="store the outputs in the notebook itself")
    options = parser.parse_args()

    failed = [path for path in options.notebooks if not run_notebook(path, out=options.out)]
    for path in failed:
        print(f"{path}: a cell failed", file=sys.stderr)
    return 1 if failed else 0


def run_notebook(path: Path, *, out: Path | None) -> bool:
    """Execute one notebook, show its outputs as they come, keep them in folder `out` (None: in place).

    Returns:
        Whether every cell ran (a cell tagged `raises-exception` is meant to fail). With a failed cell the
        notebook in place stays as it was; under `out` it is written as far as it came.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    print(f"=== {path} in a Jupyter kernel of {sys.executable}", flush=True)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=show_cell,
        extra_arguments=["--IPKernelApp.log_level=40"],  # else it warns about its loopback port
    )
    try:
        client.execute()
        succeeded = True
    except CellExecutionError:
        succeeded = False  # the traceback is among the cell's outputs, printed above
    print(f"=== {'done' if succeeded else 'FAILED'} after {time.monotonic() - started:.1f} s", flush=True)
    if out is None:
        if succeeded:
            store(notebook, path)
        return succeeded
    out.mkdir(parents=True, exist_ok=True)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    store(notebook, out / path.name)
    (out / path.with_suffix(".html").name).write_text(page, encoding="utf-8")
    print(f"=== left {out / path.name} and {out / path.with_suffix('.html').name}", flush=True)
    return succeeded


def show_cell(cell: Any, cell_index: int, execute_reply: Any) -> None:
    """Print a cell's first line and what it showed, as a terminal can show it."""
    if cell.cell_type != "code" or not cell.outputs:
        return
    source = cell.source.splitlines()
    print(f"\n[{cell.execution_count}] {source[0]}{' …' if len(source) > 1 else ''}")
    for output in cell.outputs:
        print("\n".join(f"    {line}" for line in output_text(output).splitlines()), flush=True)


def output_text(output: Any) -> str:
    """What one output says, without colours; a picture is named, not drawn."""
    if output.output_type == "stream":
        return ANSI.sub("", output.text)
    if output.output_type == "error":
        return ANSI.sub("", "\n".join(output.traceback))
    if "image/png" in output.data:
        return "(a picture: see the HTML page)"
    return str(output.data.get("text/plain", f"({', '.join(output.data)})"))


def store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the notebook without what differs from machine to machine: Python's version, the home folder."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    text = nbformat.writes(notebook).replace(str(Path.home()), "~")
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
