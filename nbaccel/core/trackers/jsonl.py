"""One line of JSON per logged step: `pandas.read_json(path, lines=True)` reads it back."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, final

import torch

__all__ = ["JsonlTracker"]


@final
class JsonlTracker:
    """Appends to `<folder>/metrics.jsonl`. A line is written out before `log` returns, so a crash loses none.

    The hyperparameters go to `<folder>/config.json`. A number that JSON cannot say is written as the string
    "NaN", "Infinity" or "-Infinity", which `float()` reads.
    """

    name = "jsonl"

    def __init__(self, folder: Path, *, file: str = "metrics.jsonl") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / file
        # Appending: a resumed run continues the file.
        self._handle = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by finish

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        text = json.dumps({key: _plain(value) for key, value in values.items()}, indent=2)
        (self._path.parent / "config.json").write_text(text + "\n", encoding="utf-8")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        line = {"step": step, "time": round(time.time(), 3)}
        line.update((key, _plain(value)) for key, value in values.items())
        self._handle.write(json.dumps(line, allow_nan=False) + "\n")

    def finish(self) -> None:
        self._handle.close()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)
