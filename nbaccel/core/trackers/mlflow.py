"""MLflow: a server, or a store of files; imported at the first use only."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, final

from nbaccel.core.trackers.behind import Behind
from nbaccel.core.trackers.beside import copy, file_name, write_images
from nbaccel.core.trackers.each import keep_each
from nbaccel.core.trackers.place import alone
from nbaccel.core.trackers.shapes import NOT_FINITE, flat

__all__ = ["MlflowTracker"]

_LONGEST_PARAMETER = 6000
_LONGEST_NAME = 250
_MOST_PARAMETERS, _MOST_METRICS = 100, 1000
"""Of a call."""
_RETRIES = "3"
_open: set[str] = set()
"""Runs of this process's trackers."""
_VARIABLE = "MLFLOW_TRACKING_URI"


class _Address:
    """What the user has set the variable to. MLflow writes there what a tracker was given, and another project's
    tracker would take it for the user's wish."""

    left: str | None = None
    """What the last tracker left in the variable."""
    _users: str | None = None

    def asked(self) -> str | None:
        found = os.environ.get(_VARIABLE)
        if found != self.left:
            self._users = found
        return self._users


_address = _Address()


@final
class MlflowTracker:
    """A run of the experiment `project`, on the server that MLFLOW_TRACKING_URI or `tracking_uri` names, else in
    `<folder>/mlflow.db`, which `mlflow ui --backend-store-uri sqlite:///…` opens. `options` are those of
    `mlflow.start_run`; `experiment_name` takes the place of `project`.

    The newest tracker's run is the one that MLflow's own functions act on. What is logged travels in a thread of its
    own: a slow server does not slow the loop. Names get "_" for what MLflow does not allow in them.
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

        self._mlflow: Any = mlflow
        uri = tracking_uri or _address.asked()
        self._folder = folder
        self._artifacts: str | None = None
        own = uri is None and folder is not None
        _step_aside(mlflow)
        if own:
            assert folder is not None
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
            self._artifacts = (folder / "artifacts").absolute().as_uri()
        if uri is not None:
            mlflow.set_tracking_uri(uri)
            _address.left = os.environ.get(_VARIABLE)
        # Trials of a sweep come at the same time, and two processes cannot make the tables of one database.
        with alone(folder, ".mlflow.lock") if own and folder is not None else contextlib.nullcontext():
            self._client: Any = mlflow.MlflowClient()
            mlflow.set_experiment(experiment_id=self._experiment(experiment_name or project))
        self._run: Any = mlflow.start_run(**{"nested": mlflow.active_run() is not None, **options})
        self._id = self._run.info.run_id
        _open.add(self._id)
        self._behind = Behind("mlflow")

    @property
    def tracker(self) -> Any:
        """The run."""
        return self._run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known: list[Any] = []
        try:
            keep_each(
                flat(values),
                lambda name, value: known.append(Param(_key(name), str(value)[:_LONGEST_PARAMETER])),
            )
        finally:
            for start in range(0, len(known), _MOST_PARAMETERS):
                self._client.log_batch(self._id, params=known[start : start + _MOST_PARAMETERS])

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
            _open.discard(self._id)
            if _is_active(self._mlflow, self._id):
                self._mlflow.end_run(status)
            else:
                self._client.set_terminated(self._id, status)

    def _experiment(self, name: str) -> str:
        """The id of the experiment of that name, made if there is none."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=self._artifacts))
            except MlflowException:
                # a run elsewhere may have made it meanwhile, on a server that no lock is for
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _send(self, values: dict[str, Any], step: int, at: float) -> None:
        from mlflow.entities import Metric

        metrics: list[Any] = []
        moment = int(at * 1000)
        try:
            keep_each(
                flat(values),
                lambda name, value: metrics.append(Metric(_key(name), _number(value), moment, step)),
            )
        finally:
            for start in range(0, len(metrics), _MOST_METRICS):
                part = metrics[start : start + _MOST_METRICS]
                self._behind.put(partial(self._client.log_batch, self._id, metrics=part))


def _step_aside(mlflow: Any) -> None:
    """A run of an older tracker of ours goes on, but is not the one that MLflow's own functions act on: as long as
    it is, MLflow starts no other."""
    for run in list(_open):
        if _is_active(mlflow, run):
            client = mlflow.MlflowClient()
            mlflow.end_run()
            client.update_run(run, "RUNNING")


def _is_active(mlflow: Any, run: str) -> bool:
    active = mlflow.active_run()
    return active is not None and active.info.run_id == run


def _number(value: Any) -> float:
    if isinstance(value, (bool, int, float)) or value in NOT_FINITE:
        return float(value)
    raise TypeError(f"its metrics are numbers, and this is {str(value)!r:.40}")


def _key(name: str) -> str:
    """A name that MLflow takes: at most 250 letters, digits, and "_-. :/", and a path that says where it leads.

    Raises:
        ValueError: it is longer, or nothing is left of it.
    """
    clean = "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)
    path = "/".join(part for part in clean.split("/") if part not in ("", ".", ".."))
    if not 0 < len(path) <= _LONGEST_NAME:
        raise ValueError(f"its names have 1 to {_LONGEST_NAME} characters")
    return path
