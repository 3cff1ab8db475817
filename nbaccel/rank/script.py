"""A script, module or notebook as the call of a rank: what `python script.py` would do, in this `__main__`."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from nbaccel.errors import ConfigError

__all__ = ["Cell", "find_module", "read_cells", "run_module", "run_notebook", "run_script"]

_RUN_THE_BODY = ("%%time", "%%timeit", "%%capture", "%%prun")
"""Cell magics whose cell means the same without them."""


def run_script(path: str, arguments: tuple[str, ...]) -> None:
    """Run a Python file as `python path arguments…` does.

    Args:
        path: absolute.
    """
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    sys.argv[:] = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    _by_name()
    exec(code, _main(__file__=path, __package__=None, __spec__=None))


def run_module(name: str, arguments: tuple[str, ...]) -> None:
    """Run a module as `python -m name arguments…` does.

    Raises:
        ConfigError: there is no such module, or it cannot be run.
    """
    sys.path.insert(0, os.getcwd())
    spec = find_module(name)
    code = spec.loader.get_code(spec.name)
    if code is None:
        raise ConfigError(f"the module {name} has no Python code to run")
    sys.argv[:] = [spec.origin or name, *arguments]
    _by_name()
    exec(code, _main(__file__=spec.origin, __package__=spec.parent, __spec__=spec, __loader__=spec.loader))


def find_module(name: str) -> Any:
    """The spec of the module that `python -m name` runs: a package's is its `__main__`.

    Raises:
        ConfigError: there is none; its parent package is imported to find out.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the module {name} cannot be found: {error}") from error
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise ConfigError(f"there is no module {name} on the import path; a file is given by its path")
    return spec


def run_notebook(path: str, arguments: tuple[str, ...]) -> None:
    """Run the code cells of a notebook, one after the other, as one script.

    Args:
        path: absolute.
    """
    sys.argv[:] = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    namespace = _main(__file__=path, __package__=None, __spec__=None)
    namespace.setdefault("display", print)
    for cell in read_cells(path):
        if not cell.source.strip():
            continue
        # with its source at hand, for tracebacks and inspect.getsource
        lines = cell.source.splitlines(keepends=True)
        linecache.cache[cell.filename] = (len(cell.source), None, lines, cell.filename)
        exec(compile(cell.source, cell.filename, "exec", dont_inherit=True), namespace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A code cell of a notebook as plain Python."""

    filename: str
    """What tracebacks call it: "train.ipynb, cell 3"."""
    source: str
    skipped: tuple[str, ...] = ()
    """Lines for IPython that plain Python has nothing for."""


def read_cells(path: str) -> Iterator[Cell]:
    """The code cells of a notebook file, in order, without what only IPython understands.

    Raises:
        ConfigError: the file is not a notebook.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
        sources = [
            cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a notebook that can be read: {error!r}") from error
    for number, source in enumerate(sources, 1):
        yield _plain(f"{os.path.basename(path)}, cell {number}", source)


def _plain(filename: str, source: str) -> Cell:
    lines = source.splitlines()
    skipped = []
    if lines and lines[0].startswith("%%"):
        if not lines[0].startswith(_RUN_THE_BODY):
            return Cell(filename=filename, source="", skipped=(lines[0],))
        skipped.append(lines[0])
        lines[0] = ""
    if not _is_python("\n".join(lines)):
        for index, line in enumerate(lines):
            words = line.lstrip()
            if words.startswith(("%", "!")) or words.endswith("?"):
                skipped.append(words)
                lines[index] = line[: len(line) - len(words)] + "pass"
    return Cell(filename=filename, source="\n".join(lines) + "\n", skipped=tuple(skipped))


def _is_python(source: str) -> bool:
    try:
        compile(source, "<cell>", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def _main(**names: Any) -> dict[str, Any]:
    """The namespace of `__main__` as Python would have filled it."""
    # what a spawned worker sends back names its own import of the script
    sys.modules["__mp_main__"] = sys.modules["__main__"]
    namespace = sys.modules["__main__"].__dict__
    namespace.update({"__name__": "__main__", "__builtins__": builtins, **names})
    return namespace


def _by_name() -> None:
    """Spawned workers of a script import it for themselves: its names need not travel by value."""
    if "reducer_override" in ForkingPickler.__dict__:
        del ForkingPickler.reducer_override
