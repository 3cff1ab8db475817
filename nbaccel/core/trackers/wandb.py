"""Weights & Biases; imported at the first use only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.beside import file_name
from nbaccel.core.trackers.shapes import plain, rows

__all__ = ["WandbTracker"]

_open: set[str] = set()
"""Runs of this process's trackers."""


@final
class WandbTracker:
    """A run of `project`. `options` are those of `wandb.init`; `mode="offline"` (or WANDB_MODE) keeps it on the
    disk until `wandb sync`. wandb samples the machine's utilisation itself.

    A run that the script has begun itself is gone on with, as `wandb.init` does; not one of another tracker."""

    name = "wandb"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import wandb

        self._wandb: Any = wandb
        if folder is not None and "dir" not in options:
            folder.mkdir(parents=True, exist_ok=True)
            options["dir"] = str(folder)
        beside = {"reinit": "create_new"} if _open else {}
        self.run: Any = wandb.init(**{"project": project, **beside, **options})
        _open.add(self.run.id)

    @property
    def tracker(self) -> Any:
        """The wandb run."""
        return self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.run.config.update({key: plain(value) for key, value in values.items()}, allow_val_change=True)

    def store_system(self, facts: dict[str, Any]) -> None:
        self.run.config.update({"system": plain(facts)}, allow_val_change=True)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.run.log(values, step=self._not_before(step), **options)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        shown = {
            name: [self._wandb.Image(pixels) for pixels in pictures] for name, pictures in values.items()
        }
        self.run.log(shown, step=self._not_before(step))

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        columns, data = rows(columns, data, dataframe)
        try:
            table = self._wandb.Table(columns=columns, data=data)
        except TypeError:
            # a column of several types; not asked for otherwise, as it takes the columns their types
            table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self.run.log({table_name: table}, step=self._not_before(step))

    def log_file(self, path: Path, name: str) -> None:
        artifact = self._wandb.Artifact(file_name(name, None, ""), type="folder" if path.is_dir() else "file")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path), name=path.name)
        self.run.log_artifact(artifact)

    def finish(self) -> None:
        self._end(0)

    def finish_failed(self) -> None:
        self._end(1)

    def _end(self, exit_code: int) -> None:
        _open.discard(self.run.id)
        self.run.finish(exit_code=exit_code)

    def _not_before(self, step: int | None) -> int | None:
        """The step, or the newest so far: wandb drops what is logged for an earlier one."""
        return None if step is None else max(step, self.run.step)
