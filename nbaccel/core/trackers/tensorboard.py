"""Event files for TensorBoard, through torch's own writer; imported at the first use only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch

__all__ = ["TensorBoardTracker"]


@final
class TensorBoardTracker:
    """Writes to `<folder>`. Numbers become scalars, dicts groups of scalars, strings text, larger tensors
    histograms. `options` are those of `torch.utils.tensorboard.SummaryWriter`."""

    name = "tensorboard"

    def __init__(self, folder: Path, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), **options)

    @property
    def tracker(self) -> Any:
        """The SummaryWriter."""
        return self._writer

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        # Not SummaryWriter.add_hparams, which opens a second writer in a folder of its own.
        for summary in hparams(plain, {}):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        for key, value in values.items():
            if isinstance(value, (bool, int, float)):
                self._writer.add_scalar(key, value, step)
            elif isinstance(value, dict):
                self._writer.add_scalars(key, value, step)
            elif isinstance(value, torch.Tensor):
                self._writer.add_histogram(key, value, step)
            else:
                self._writer.add_text(key, str(value), step)

    def finish(self) -> None:
        self._writer.close()
