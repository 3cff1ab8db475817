"""Weights & Biases; imported at the first use only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.beside import file_name
from nbaccel.core.trackers.shapes import plain

__all__ = ["WandbTracker"]


@final
class WandbTracker:
    """A run of `project`. `options` are those of `wandb.init`; `mode="offline"` (or WANDB_MODE) keeps it on the
    disk until `wandb sync`. wandb samples the machine's utilisation itself."""

    name = "wandb"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import wandb

        self._wandb: Any = wandb
        if folder is not None and "dir" not in options:
            folder.mkdir(parents=True, exist_ok=True)
            options["dir"] = str(folder)
        self._run: Any = wandb.init(**{"project": project, **options})

    @property
    def tracker(self) -> Any:
        """The wandb run."""
        return self._run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._run.config.update({key: plain(value) for key, value in values.items()}, allow_val_change=True)

    def store_system(self, facts: dict[str, Any]) -> None:
        self._run.config.update({"system": plain(facts)}, allow_val_change=True)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._run.log(values, step=self._not_before(step))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        shown = {
            name: [self._wandb.Image(pixels) for pixels in pictures] for name, pictures in values.items()
        }
        self._run.log(shown, step=self._not_before(step))

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        try:
            table = self._wandb.Table(columns=columns, data=data)
        except TypeError:
            # a column of several types; not asked for otherwise, as it takes the columns their types
            table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self._run.log({table_name: table}, step=self._not_before(step))

    def log_file(self, path: Path, name: str) -> None:
        artifact = self._wandb.Artifact(file_name(name, None, ""), type="folder" if path.is_dir() else "file")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()

    def finish_failed(self) -> None:
        self._run.finish(exit_code=1)

    def _not_before(self, step: int | None) -> int | None:
        """The step, or the newest so far: wandb drops what is logged for an earlier one."""
        return None if step is None else max(step, self._run.step)
