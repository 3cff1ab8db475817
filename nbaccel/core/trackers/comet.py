"""Comet; imported at the first use only."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePath
from typing import Any, final

import torch

from nbaccel.core.trackers.beside import file_name, files_of
from nbaccel.core.trackers.each import keep_each
from nbaccel.core.trackers.shapes import flat

__all__ = ["CometTracker"]

_open: set[str] = set()
"""Experiments of this process's trackers."""


@final
class CometTracker:
    """An experiment of `project`. `options` are those of `comet_ml.start`; `online=False` keeps it as an archive
    in the project's folder for `comet upload`. Comet samples the machine's utilisation itself.

    An experiment that the script has begun itself is gone on with, as `comet_ml.start` does; that of another tracker is
    ended, for Comet has one at a time in a process."""

    name = "comet_ml"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import comet_ml

        if folder is not None and "experiment_config" not in options:
            folder.mkdir(parents=True, exist_ok=True)
            # also where it falls back to when the network is gone
            options["experiment_config"] = comet_ml.ExperimentConfig(offline_directory=str(folder))
        beside = {"mode": "create"} if _open else {}
        self._experiment: Any = comet_ml.start(**{"project_name": project, **beside, **options})
        self._id = self._experiment.get_key()
        _open.add(self._id)

    @property
    def tracker(self) -> Any:
        """The experiment."""
        return self._experiment

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._experiment.log_parameters(flat(values))

    def store_system(self, facts: dict[str, Any]) -> None:
        self._experiment.log_others(flat(facts, "system."))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self._experiment.ended:
            raise RuntimeError(
                "its experiment has ended: Comet has one at a time, and a later one may have begun"
            )
        keep_each(values, partial(self._keep, step))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        for name, pictures in values.items():
            for at, pixels in enumerate(pictures):
                shown = name if len(pictures) == 1 else f"{name}/{at}"
                self._experiment.log_image(
                    pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, shown, step=step
                )

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        self._experiment.log_table(file_name(table_name, step, ".csv"), tabular_data=data, headers=columns)

    def log_file(self, path: Path, name: str) -> None:
        # file by file: log_asset_folder gives the folder's own name, and leaves out the folders in it
        for within, file in files_of(path):
            self._experiment.log_asset(str(file), file_name=str(PurePath(name, within)), copy_to_tmp=True)

    def finish(self) -> None:
        _open.discard(self._id)
        self._experiment.end()

    def _keep(self, step: int | None, name: str, value: Any) -> None:
        if isinstance(value, (bool, int, float)):
            self._experiment.log_metric(name, value, step=step)
        elif isinstance(value, dict):
            self._experiment.log_metrics(value, prefix=name, step=step)
        elif isinstance(value, torch.Tensor):
            self._experiment.log_histogram_3d(value.numpy(), name=name, step=step)
        else:
            self._experiment.log_text(str(value), step=step, metadata={"name": name})
