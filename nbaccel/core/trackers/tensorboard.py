"""Event files for TensorBoard, through torch's own writer; imported at the first use only."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from nbaccel.core.trackers.each import keep_each
from nbaccel.core.trackers.shapes import leaves, pictures, plain

__all__ = ["TensorBoardTracker"]


@final
class TensorBoardTracker:
    """Writes to `<folder>`. Numbers become scalars, dicts groups of scalars, strings text, larger tensors
    histograms, tables text. `options` are those of `torch.utils.tensorboard.SummaryWriter`."""

    name = "tensorboard"

    def __init__(self, folder: Path, *, project: str = "", **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), **options)
        """What `tracker` gives."""

    @property
    def tracker(self) -> Any:
        """The SummaryWriter."""
        return self.writer

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        known = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        # Not SummaryWriter.add_hparams, which opens a second writer in a folder of its own.
        for summary in hparams(known, {}):  # type: ignore[no-untyped-call]
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def store_system(self, facts: dict[str, Any]) -> None:
        text = json.dumps(plain(facts), indent=2)
        self.writer.add_text("system", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        keep_each(values, partial(self._keep, step))

    def log_system(self, values: dict[str, float], step: int, time: float) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step, walltime=time)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        for key, value in values.items():
            shown = pictures(value)  # scripts also call this themselves, with arrays as accelerate takes them
            for at, pixels in enumerate(shown):
                name = key if len(shown) == 1 else f"{key}/{at}"
                self.writer.add_image(name, pixels, step, dataformats="HWC")

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        lines = [columns, ["---"] * len(columns), *data]
        self.writer.add_text(
            table_name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step
        )

    def finish(self) -> None:
        self.writer.close()

    def _keep(self, step: int | None, key: str, value: Any) -> None:
        if isinstance(value, (bool, int, float)):
            self.writer.add_scalar(key, value, step)
        elif isinstance(value, dict):
            self._keep_group(step, key, leaves(value))
        elif isinstance(value, torch.Tensor):
            self.writer.add_histogram(key, value, step)
        else:
            self.writer.add_text(key, str(value), step)

    def _keep_group(self, step: int | None, key: str, group: dict[str, Any]) -> None:
        """Its numbers in one chart, anything else by itself."""
        numbers = {name: value for name, value in group.items() if _is_number(value)}
        if numbers:
            self.writer.add_scalars(key, numbers, step)
        others = {f"{key}/{name}": value for name, value in group.items() if name not in numbers}
        keep_each(others, partial(self._keep, step))


def _cell(value: Any) -> str:
    """As it stands in a table of Markdown, where "|" and the end of a line would end it."""
    return "<br>".join(str(value).replace("|", "\\|").splitlines())


def _is_number(value: Any) -> bool:
    """Also a tensor or array of one element, as in a dict none of them has been read yet."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (bool, int, float)) or getattr(value, "size", 0) == 1
