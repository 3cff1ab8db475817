"""Weights & Biases; imported at the first use only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.beside import file_name
from nbaccel.core.trackers.shapes import plain, rows

__all__ = ["WandbTracker"]

_open: list[Any] = []
"""Runs of this process's trackers, the newest last."""
_LED = (
    "config",
    "log",
    "summary",
    "save",
    "use_artifact",
    "log_artifact",
    "define_metric",
    "alert",
    "mark_preempting",
    "log_model",
    "use_model",
    "link_model",
    "watch",
    "unwatch",
)
"""What the package has of one run, beside `wandb.run`."""


@final
class WandbTracker:
    """A run of `project`. `options` are those of `wandb.init`; `mode="offline"` (or WANDB_MODE) keeps it on the
    disk until `wandb sync`. wandb samples the machine's utilisation itself.

    A run that the script has begun itself is gone on with; not one of another tracker. The newest tracker's run is the
    one that the package's own functions (`wandb.log`) act on; after its end, the newest of those that go on."""

    name = "wandb"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import wandb

        self._wandb: Any = wandb
        if folder is not None and "dir" not in options:
            folder.mkdir(parents=True, exist_ok=True)
            options["dir"] = str(folder)
        _open[:] = [run for run in _open if not _ended(run)]
        # by default a kernel's run would be ended, a script's gone on with
        reinit = "create_new" if _open else "return_previous"
        self.run: Any = wandb.init(**{"project": project, "reinit": reinit, **options})
        _open.append(self.run)
        _lead(wandb, self.run)

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
        _open[:] = [run for run in _open if run is not self.run and not _ended(run)]
        self.run.finish(exit_code=exit_code)
        if _open and self._wandb.run is None:
            _lead(self._wandb, _open[-1])

    def _not_before(self, step: int | None) -> int | None:
        """The step, or the newest so far: wandb drops what is logged for an earlier one."""
        # a run that the script has finished says so when it is logged to, and is silent for 30 s when asked its step
        return step if step is None or _ended(self.run) else max(step, self.run.step)


def _ended(run: Any) -> bool:
    return bool(getattr(run, "_is_finished", False))


def _lead(wandb: Any, run: Any) -> None:
    """Has W&B's own functions act on `run`; a run made beside another is nobody's for them."""
    wandb.run = run
    for name in _LED:
        if hasattr(run, name):
            setattr(wandb, name, getattr(run, name))
