"""One line of JSON per logged step: `pandas.read_json(path, lines=True)` reads it back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any, final

from nbaccel.core.trackers.beside import write_copy, write_images, write_table
from nbaccel.core.trackers.shapes import beside_line, plain

__all__ = ["JsonlTracker"]


@final
class JsonlTracker:
    """Appends to `<folder>/metrics.jsonl`. A line is written out before `log` returns, so a crash loses none.

    The hyperparameters go to `config.json`, the machine to `system.json`, its utilisation to `system.jsonl`, and
    images, tables and files to folders of these names. A number that JSON cannot say is written as the string
    "NaN", "Infinity" or "-Infinity", which `float()` reads. `step` and `time` are the line's own: metrics called so
    are "metrics.step" and "metrics.time".
    """

    name = "jsonl"

    def __init__(self, folder: Path, *, project: str = "", file: str = "metrics.jsonl") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / file
        self._handle = _appending(self._path)
        self._system: IO[str] | None = None

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write("config.json", values)

    def store_system(self, facts: dict[str, Any]) -> None:
        self._write("system.json", facts)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        _write_line(self._handle, values, step, time.time())

    def log_system(self, values: dict[str, float], step: int, time: float) -> None:
        if self._system is None:
            self._system = _appending(self._path.with_name("system.jsonl"))
        _write_line(self._system, values, step, time)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        write_images(self._path.parent, values, step)

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        write_table(self._path.parent, table_name, columns, data, step)

    def log_file(self, path: Path, name: str) -> None:
        write_copy(self._path.parent, path, name)

    def finish(self) -> None:
        self._handle.close()
        if self._system is not None:
            self._system.close()

    def _write(self, name: str, values: dict[str, Any]) -> None:
        text = json.dumps({key: plain(value) for key, value in values.items()}, indent=2)
        self._path.with_name(name).write_text(text + "\n", encoding="utf-8")


def _appending(path: Path) -> IO[str]:
    """A resumed run continues the file."""
    return open(path, "a", encoding="utf-8", buffering=1)


def _write_line(file: IO[str], values: dict[str, Any], step: int | None, time: float) -> None:
    line = {"step": step, "time": round(time, 3)}
    line.update((key, plain(value)) for key, value in beside_line(values).items())
    file.write(json.dumps(line, allow_nan=False) + "\n")
