"""A table of what was logged, for spreadsheets: `pandas.read_csv(path)`."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.beside import write_copy, write_images, write_table
from nbaccel.core.trackers.shapes import beside_line, flat, plain

__all__ = ["CsvTracker"]


@final
class CsvTracker:
    """Appends to `<folder>/metrics.csv`, one row per call, one column per name; `step` and `time` come
    first, and metrics called so are "metrics.step" and "metrics.time".

    A name that is logged for the first time later gets a column then, for which the file is written anew. The
    hyperparameters go to `config.json`, the machine to `system.json`, its utilisation to `system.csv`, and images,
    tables and files to folders of these names.
    """

    name = "csv"

    def __init__(self, folder: Path, *, project: str = "", file: str = "metrics.csv") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._metrics = _Rows(folder / file)
        self._system: _Rows | None = None

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._metrics.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write("config.json", values)

    def store_system(self, facts: dict[str, Any]) -> None:
        self._write("system.json", facts)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._metrics.append({"step": step, "time": round(time.time(), 3), **beside_line(flat(values))})

    def log_system(self, values: dict[str, float], step: int, time: float) -> None:
        if self._system is None:
            self._system = _Rows(self._folder / "system.csv")
        self._system.append({"step": step, "time": round(time, 3), **values})

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        write_images(self._folder, values, step)

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        write_table(self._folder, table_name, columns, data, step)

    def log_file(self, path: Path, name: str) -> None:
        write_copy(self._folder, path, name)

    def finish(self) -> None:
        """Every row is on the disk already."""

    def _write(self, name: str, values: dict[str, Any]) -> None:
        text = json.dumps({key: plain(value) for key, value in values.items()}, indent=2)
        (self._folder / name).write_text(text + "\n", encoding="utf-8")


@final
class _Rows:
    """A CSV file that gains columns. Opened for each row: a copy of it at any time is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        if path.exists():  # a resumed run continues the file
            with path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])

    def append(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen([*self._columns, *new])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, columns: list[str]) -> None:
        rows: list[dict[str, Any]] = []
        if self._columns:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        half = self.path.with_name(f".{self.path.name}")
        with half.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(half, self.path)
        self._columns = columns
