"""Aim; imported at the first use only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from nbaccel.core.trackers.each import keep_each
from nbaccel.core.trackers.shapes import leaves, plain

__all__ = ["AimTracker"]


@final
class AimTracker:
    """A run of the experiment `project` in the Aim repository in `<folder>`'s parent (the project's folder), else in
    the working folder. `options` are those of `aim.Run`. Aim samples the machine's utilisation itself."""

    name = "aim"

    def __init__(self, folder: Path | None, *, project: str, **options: Any) -> None:
        import aim

        self._aim: Any = aim
        if folder is not None and "repo" not in options:
            folder.parent.mkdir(parents=True, exist_ok=True)
            options["repo"] = str(folder.parent)
        self._run: Any = self._aim.Run(**{"experiment": project, **options})

    @property
    def tracker(self) -> Any:
        """The run."""
        return self._run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._run["hparams"] = {key: plain(value) for key, value in values.items()}

    def store_system(self, facts: dict[str, Any]) -> None:
        self._run["system"] = plain(facts)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        keep_each(leaves(values, by="/"), partial(self._keep, step))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        from PIL import Image

        for name, pictures in values.items():
            shown = [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pictures]
            self._run.track([self._aim.Image(one) for one in shown], name=name, step=step)

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        text = "\n".join("\t".join(map(str, line)) for line in [columns, *data])
        self._run.track(self._aim.Text(text), name=table_name, step=step)

    def finish(self) -> None:
        self._run.close()

    def _keep(self, step: int | None, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = self._aim.Distribution(value.numpy()) if value.ndim else value.item()
        elif isinstance(value, str):
            value = self._aim.Text(value)
        self._run.track(value, name=name, step=step)
