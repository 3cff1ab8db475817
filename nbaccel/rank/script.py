"""A script, module or notebook as the call of a rank: what `python script.py` would do, in this `__main__`."""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import io
import linecache
import os
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

from nbaccel.errors import ConfigError
from nbaccel.rank.cells import Cell, lines_of, read_cells
from nbaccel.rank.tagged import Leaving, show

__all__ = ["find_module", "run_module", "run_notebook", "run_script"]


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

    A cell with the tag "raises-exception" that raises shows its traceback, and the notebook goes on.

    Args:
        path: absolute.
    """
    sys.argv[:] = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    # As in its kernel there is no `__file__`: a spawned worker would run that as Python.
    namespace = _main(__package__=None, __spec__=None)
    namespace.setdefault("display", print)
    cells = read_cells(path)
    leaving = Leaving() if any(cell.may_raise for cell in cells) else None
    awaits = any(cell.awaits for cell in cells)
    around: contextlib.AbstractContextManager[Any] = _event_loop() if awaits else contextlib.nullcontext()
    with around as loop:
        for cell in cells:
            # with its source at hand, for tracebacks and inspect.getsource
            lines = lines_of(cell.source)
            linecache.cache[cell.filename] = (len(cell.source), None, lines, cell.filename)
            if leaving is None or not cell.may_raise:
                _run_cell(cell, namespace, loop)
            else:
                leaving.leave(cell.filename, _error_of(cell, namespace, loop))


def _run_cell(cell: Cell, namespace: dict[str, Any], loop: Any) -> None:
    result = eval(cell.code, namespace)
    if cell.awaits:
        loop.run_until_complete(result)


def _error_of(cell: Cell, namespace: dict[str, Any], loop: Any) -> Exception | None:
    """What the cell raised, once it was shown."""
    try:
        _run_cell(cell, namespace, loop)
    except Exception as error:  # noqa: BLE001  # as the cell's tag asks
        show(error, cell.filename)
        return error
    return None


@contextlib.contextmanager
def _event_loop() -> Iterator[Any]:
    """One for all cells: what one of them made, another may await."""
    import asyncio  # its import takes time, and few notebooks need it

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


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
