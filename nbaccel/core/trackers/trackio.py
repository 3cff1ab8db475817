"""Trackio, Hugging Face's local tracker; imported at the first use only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.beside import file_name
from nbaccel.core.trackers.shapes import plain

__all__ = ["TrackioTracker"]


@final
class TrackioTracker:
    """A run of `project`, kept in Trackio's own folder (TRACKIO_DIR) or the Space that `options` name; these are
    those of `trackio.init`. Without a Space it is offline."""

    name = "trackio"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import trackio

        self._trackio: Any = trackio
        self.run: Any = trackio.init(**{"project": project, **options})

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.run.config.update({key: plain(value) for key, value in values.items()})

    def store_system(self, facts: dict[str, Any]) -> None:
        self.run.config.update({"system": plain(facts)})

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.run.log({key: plain(value) for key, value in values.items()}, step=step)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        for name, pictures in values.items():
            for at, pixels in enumerate(pictures):
                shown = name if len(pictures) == 1 else f"{name}/{at}"
                grey = pixels.shape[-1] == 1
                self.run.log({shown: self._trackio.Image(pixels[:, :, 0] if grey else pixels)}, step=step)

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        import pandas  # type: ignore[import-untyped, unused-ignore]

        table = self._trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))
        self.run.log({table_name: table}, step=step)

    def log_file(self, path: Path, name: str) -> None:
        self.run.log_artifact(str(path), name=file_name(name, None, ""))

    def finish(self) -> None:
        self.run.finish()
