"""MLflow: a server, or a store of files; imported at the first use only."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.behind import Behind
from nbaccel.core.trackers.beside import copy, file_name, write_images
from nbaccel.core.trackers.shapes import NOT_FINITE, flat

__all__ = ["MlflowTracker"]

_LONGEST_PARAMETER = 6000
_MOST_PARAMETERS = 100
_RETRIES = "3"


@final
class MlflowTracker:
    """A run of the experiment `project`, on the server that MLFLOW_TRACKING_URI or `tracking_uri` names, else in
    `<folder>/mlflow.db`, which `mlflow ui --backend-store-uri sqlite:///…` opens. `options` are those of
    `mlflow.start_run`; `experiment_name` takes the place of `project`.

    What is logged travels in a thread of its own: a slow server does not slow the loop. Names get "_" for what
    MLflow does not allow in them; values that are no numbers are left out.
    """

    name = "mlflow"

    def __init__(
        self,
        folder: Path | None,
        *,
        project: str,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        **options: Any,
    ) -> None:
        # Its own seven tries, further and further apart, hold up the start for minutes when nobody answers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
        import mlflow

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._folder = folder
        self._artifacts: str | None = None
        if uri is None and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
            self._artifacts = (folder / "artifacts").absolute().as_uri()
        if uri is not None:
            mlflow.set_tracking_uri(uri)
        self._mlflow: Any = mlflow
        self._client: Any = mlflow.MlflowClient()
        mlflow.set_experiment(experiment_id=self._experiment(experiment_name or project))
        self._run: Any = mlflow.start_run(**options)
        self._id = self._run.info.run_id
        self._behind = Behind("mlflow")

    @property
    def tracker(self) -> Any:
        """The active run."""
        return self._run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        known = [(_key(name), str(value)[:_LONGEST_PARAMETER]) for name, value in flat(values).items()]
        for start in range(0, len(known), _MOST_PARAMETERS):
            self._mlflow.log_params(dict(known[start : start + _MOST_PARAMETERS]), run_id=self._id)

    def store_system(self, facts: dict[str, Any]) -> None:
        for name, value in flat(facts, "system.").items():
            self._behind.put(partial(self._client.set_tag, self._id, _key(name), str(value)))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._send(values, step or 0, time.time())

    def log_system(self, values: dict[str, float], step: int, time: float) -> None:
        self._send(values, step, time)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for path in write_images(Path(folder), values, step):
                    self._client.log_artifact(self._id, str(path), "images")

        self._behind.put(send)

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        table = {name: [row[at] for row in data] for at, name in enumerate(columns)}
        file = f"tables/{file_name(table_name, step, '.json')}"
        self._behind.put(partial(self._client.log_table, self._id, table, file))

    def log_file(self, path: Path, name: str) -> None:
        # A copy of this moment, under the name it is to have: it is sent later, when the file may be another or gone.
        kept = tempfile.TemporaryDirectory()
        try:
            copy(path, Path(kept.name) / name, home=self._folder)
        except BaseException:
            kept.cleanup()
            raise

        def send() -> None:
            with kept:
                self._client.log_artifacts(self._id, kept.name, "files")

        self._behind.put(send)

    def finish(self) -> None:
        self._end("FINISHED")

    def finish_failed(self) -> None:
        self._end("FAILED")

    def _end(self, status: str) -> None:
        try:
            self._behind.close()
        finally:
            self._mlflow.end_run(status)

    def _experiment(self, name: str) -> str:
        """The id of the experiment of that name, made if there is none."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=self._artifacts))

    def _send(self, values: dict[str, Any], step: int, at: float) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_key(name), float(value), int(at * 1000), step)
            for name, value in flat(values).items()
            if isinstance(value, (bool, int, float)) or value in NOT_FINITE
        ]
        if metrics:
            self._behind.put(partial(self._client.log_batch, self._id, metrics=metrics))


def _key(name: str) -> str:
    """A name that MLflow takes: letters, digits, and "_-. :/"."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)
