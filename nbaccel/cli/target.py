"""What `nbaccel launch` runs: a script, a module or a notebook, checked before any process starts."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbaccel.checks import nearest
from nbaccel.cli.runs import read_json
from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.rank import script
from nbaccel.rank.cells import read_cells

__all__ = ["Earlier", "Target", "find_target", "read_run"]

_MOST_SOURCE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something to run, with its own arguments."""

    function: Callable[[str, tuple[str, ...]], None]
    """Runs it in a rank."""
    path: str
    """Absolute path, or the module's name."""
    arguments: tuple[str, ...]
    name: str
    """What the run is called."""
    notes: tuple[str, ...] = ()
    """What the user should know of it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of the command that are no configuration."""
    variables: tuple[str, ...] = ()
    """Names of what `--env` set; the values may be secrets and are not kept."""

    @property
    def is_module(self) -> bool:
        """Whether `path` is the name of a module."""
        return self.function is script.run_module

    def facts(self) -> dict[str, Any]:
        """For the run folder: enough to run it again."""
        source = None
        if not self.is_module and os.path.getsize(self.path) <= _MOST_SOURCE:
            source = _text(self.path)
        command = {
            "target": self.path,
            "module": self.is_module,
            "arguments": list(self.arguments),
            "options": dict(self.options),
            "variables": list(self.variables),
        }
        return {"function": self.path, "source": source, "command": command}


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What an earlier run was asked."""

    target: str
    arguments: tuple[str, ...]
    module: bool
    config: RunConfig
    cwd: str
    options: Mapping[str, Any]
    variables: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_run(folder: Path) -> Earlier:
    """What the run in this folder was asked, to run it again.

    Raises:
        ConfigError: it was no run of `nbaccel launch`, or its record is damaged.
    """
    facts, asked = read_json(folder / "run.json"), read_json(folder / "config.json")
    command = facts.get("command")
    if not isinstance(command, dict):
        raise ConfigError(f"{folder.name} was not started by `nbaccel launch`: it has no script to run again")
    kinds = {"target": str, "arguments": list, "module": bool, "options": dict, "variables": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(command.get(name), kind)]:
        raise ConfigError(
            f"{folder / 'run.json'} is damaged: it does not say the run's {', '.join(wrong)}. "
            "Launch the script by its path"
        )
    asked.pop("sources", None)
    target = command["target"]
    notes = []
    source = facts.get("source")
    if source is not None and os.path.exists(target) and _text(target) != source:
        notes.append(f"{target} has changed since {folder.name}; it runs as it is now")
    return Earlier(
        target=target,
        arguments=tuple(command["arguments"]),
        module=command["module"],
        config=RunConfig.from_mapping(asked, place=f"the run {folder.name}"),
        cwd=str(facts.get("cwd", "")),
        options=command["options"],
        variables=tuple(command["variables"]),
        notes=tuple(notes),
    )


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def find_target(text: str, arguments: tuple[str, ...], *, module: bool) -> Target:
    """The target that `text` names.

    Raises:
        ConfigError: there is no such file or module, or it is nothing that can be run.
    """
    if module:
        _require_package(text)
        return Target(function=script.run_module, path=text, arguments=arguments, name=text)
    path = os.path.abspath(text)
    if not os.path.exists(path):
        raise ConfigError(f"there is no file {text}{_hint(text)}")
    if os.path.isdir(path):
        raise ConfigError(f"{text} is a folder: give a script in it, or -m for a package")
    name = os.path.basename(path)
    if path.endswith(".ipynb"):
        with _unwarned():
            cells = read_cells(path)
        skipped = [f"\n  {cell.filename}: {line}" for cell in cells for line in cell.skipped]
        notes = (f"these are for IPython and are left out:{''.join(skipped)}",) if skipped else ()
        return Target(function=script.run_notebook, path=path, arguments=arguments, name=name, notes=notes)
    try:
        with _unwarned():
            compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OSError) as error:
        raise ConfigError(f"{text} cannot be run: {type(error).__name__}: {error}") from error
    return Target(function=script.run_script, path=path, arguments=arguments, name=name)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warnings of what is compiled: the ranks will give them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _require_package(module: str) -> None:
    """That the outermost package is there; what is in it only its import would tell."""
    top = module.partition(".")[0]
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does
    try:
        found = top in sys.modules or importlib.util.find_spec(top) is not None
    except ValueError:
        found = False
    finally:
        sys.path.remove(here)
    if not found:
        file = " A script is given by its path, without -m." if os.path.exists(module) else ""
        raise ConfigError(f"there is no module {top} on the import path.{file}")


def _hint(text: str) -> str:
    if not text.endswith((".py", ".ipynb")) and os.sep not in text:
        return f"; a module is run with -m {text}"
    folder = os.path.dirname(text) or "."
    try:
        close = nearest(os.path.basename(text), os.listdir(folder))
    except OSError:
        return f"; there is no folder {folder} either"
    return f"; there is {os.path.join(os.path.dirname(text), close)}" if close else ""
