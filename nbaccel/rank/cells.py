"""The code cells of a notebook as plain Python, to be run as one script."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import io
import json
import operator
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, final

from nbaccel.errors import ConfigError

__all__ = ["Cell", "lines_of", "read_cells"]

# `from __future__ import annotations` and its like: in a notebook they hold for the cells that follow, too.
_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_RUN_THE_BODY = ("%%time", "%%timeit", "%%capture", "%%prun")
"""Cell magics whose cell means the same without them."""
_RUN_THE_STATEMENT = {
    "time": re.compile(r"(--no-raise-error(\s+|$))?"),
    "timeit": re.compile(r"(-([nrpv]\s*\S+|[tcqo]+)(\s+|$))*"),
    "prun": re.compile(r"(-([DlsT]\s*\S+|[rq]+)(\s+|$))*"),
}
"""Line magics whose statement means the same without them, and the options that stand before it."""
_RUNS = " (what it measures runs once, as plain Python)"
_CALL = re.compile(r"get_ipython\(\)\.run_line_magic\((.*)\)$")
_MAY_RAISE, _LEFT_OUT = "raises-exception", "skip-execution"
"""Tags of cells, as nbclient knows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A code cell of a notebook as plain Python."""

    filename: str
    """What tracebacks call it: "train.ipynb, cell 3"."""
    source: str
    code: CodeType
    skipped: tuple[str, ...] = ()
    """Lines for IPython that plain Python has nothing for."""
    may_raise: bool = False
    """Whether the notebook goes on when it raises: it is tagged "raises-exception"."""

    @property
    def awaits(self) -> bool:
        """Whether running `code` gives a coroutine: there is an `await` outside functions."""
        return bool(self.code.co_flags & inspect.CO_COROUTINE)


def read_cells(path: str) -> list[Cell]:
    """The code cells of a notebook file, in order, without what only IPython understands.

    Raises:
        ConfigError: the file is not a notebook, or has a cell that is not Python; the message names the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
        sources = [
            cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells
        ]
        tags = [tuple(cell.get("metadata", {}).get("tags", ())) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a notebook that can be read: {error!r}") from error
    name = os.path.basename(path)
    found, future = list[Cell](), 0
    for number, (source, tagged) in enumerate(zip(sources, tags, strict=True), 1):
        found.append(_tagged(f"{name}, cell {number}", source, future, tagged))
        future = found[-1].code.co_flags & _FUTURE
    return found


def _tagged(filename: str, source: str, future: int, tags: Collection[str]) -> Cell:
    if _LEFT_OUT in tags:
        nothing = _compiled("", filename, future)
        return Cell(filename=filename, source="", code=nothing, skipped=(f"the cell, tagged {_LEFT_OUT}",))
    if _MAY_RAISE not in tags:
        return _plain(filename, source, future)
    try:
        return replace(_plain(filename, source, future), may_raise=True)
    except _NotPythonError:  # which is what this cell is there to show
        late = _compiled(f"compile({source!r}, {filename!r}, 'exec')", filename, future)
        return Cell(filename=filename, source=source, code=late, may_raise=True)


@final
class _NotPythonError(ConfigError):
    """The cell is no Python, whatever is left out of it."""


def _plain(filename: str, source: str, future: int) -> Cell:
    try:
        return Cell(filename=filename, source=source, code=_compiled(source, filename, future))
    except (SyntaxError, ValueError):
        pass  # perhaps it is IPython's
    lines, skipped = lines_of(source + "\n"), list[str]()
    first = next(index for index, line in enumerate(lines) if line.strip())
    if lines[first].startswith("%%") and not re.match(r"%%\w+\?", lines[first]):
        magic, _, options = lines[first].strip().partition(" ")
        runs = magic in _RUN_THE_BODY
        skipped.append(lines[first].strip() + _RUNS * runs)
        setup = _RUN_THE_STATEMENT["timeit"].sub("", options, count=1) if magic == "%%timeit" else ""
        # lines keep their numbers
        lines = ["\n"] * first + ([f"{setup}\n", *lines[first + 1 :]] if runs else [])
    source = "".join(_without_ipython(lines, filename, skipped))
    try:
        code = _compiled(source, filename, future)
    except (SyntaxError, ValueError) as error:
        raise _NotPythonError(f"{filename} cannot be run: {type(error).__name__}: {error}") from error
    return Cell(filename=filename, source=source, code=code, skipped=tuple(skipped))


def _compiled(source: str, filename: str, future: int) -> CodeType:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | future
    code: CodeType = compile(source, filename, "exec", flags=flags, dont_inherit=True)
    return code


def _without_ipython(lines: list[str], filename: str, skipped: list[str]) -> list[str]:
    """`lines` with `pass` for each command of IPython's, found by its own rules; the commands go to `skipped`."""
    # its import takes time, and few notebooks need it
    from IPython.core.inputtransformer2 import TransformerManager

    rules: Any = TransformerManager
    while True:
        # one command at a time becomes a line that calls IPython, whatever number of lines it had
        changed, new = rules().do_one_token_transform(lines)
        if not changed or new == lines:
            return lines
        start = next(index for index, line in enumerate(new) if line != lines[index])
        end = start + 1 + len(lines) - len(new)
        call, command = new[start].strip(), "".join(lines[start:end]).strip()
        if (measured := _measured(call)) is not None:
            skipped.append(command + _RUNS)
            new[start] = new[start].replace(call, measured)
        elif call.startswith("get_ipython()."):
            skipped.append(command)
            indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
            new[start] = f"{indent}pass\n"
        elif "get_ipython()." in call:
            raise ConfigError(
                f"{filename}, line {start + 1}: {command!r} takes a value from IPython, and a launched notebook "
                "runs as plain Python. Write it in Python, as with subprocess.run"
            )
        lines = [*new[: start + 1], *["\n"] * (end - start - 1), *new[start + 1 :]]


def _measured(call: str) -> str | None:
    """The statement that this call of IPython's only measures, with what it is assigned to."""
    found = _CALL.search(call)
    if found is None:
        return None
    name, statement = ast.literal_eval(found[1])
    if name not in _RUN_THE_STATEMENT or (
        found.start() and name != "time"
    ):  # the others' value is a measurement
        return None
    return call[: found.start()] + (_RUN_THE_STATEMENT[name].sub("", statement, count=1) or "pass")


def lines_of(source: str) -> list[str]:
    """As Python counts them: `str.splitlines` also cuts at characters that may stand within a text."""
    return io.StringIO(source).readlines()
