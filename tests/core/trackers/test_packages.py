"""The real packages, offline: one launch of two ranks logs to all that are installed, and each is read back by its
own reader. MLflow once more through a real server on 127.0.0.1. It is one launch for all that the tests look at: the
packages take more than ten seconds to import."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nbaccel import Accelerator, launch
from nbaccel.core.trackers import open_trackers
from nbaccel.core.world import single
from nbaccel.errors import WorkerError
from tests.conftest import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AIM: dict[str, dict[str, Any]] = (
    {"aim": {"system_tracking_interval": None, "log_system_params": False}} if find_spec("aim") else {}
)
"""Its options, where it is installed."""
PACKAGES = ("wandb", "mlflow", "comet_ml", "trackio", *AIM)
CONFIG = {"lr": 0.1, "net": {"width": 8}}
VARIABLES = {
    "WANDB_SILENT": "true",
    "COMET_LOGGING_CONSOLE": "ERROR",
    "COMET_INTERNAL_SENTRY_DSN": "",  # it would report our own use of it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A real `mlflow server`, and its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/files",
    ]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *place, *store],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
                    break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def train(folder: str) -> dict[str, Any]:
    """What a script does, twice, the second time with a server that the other rank is; then what the packages' own
    readers find, as far as they read what this process wrote."""
    names = PACKAGES
    before = [name for name in names if name in sys.modules]
    acc = Accelerator(cpu=True, project_dir=folder, log_with="all")
    acc.init_trackers(
        "proj",
        config=CONFIG,
        init_kwargs={"wandb": {"mode": "offline"}, "comet_ml": {"online": False}, **AIM},
    )
    imported = [name for name in names if name in sys.modules]
    kinds = {type(acc.get_tracker(name, unwrap=True)).__name__ for name in names}
    loop(acc, folder)
    found = {"before": before, "imported": imported, "kinds": kinds}
    if acc.is_main_process:
        found.update(mlflow=read_mlflow("proj"), trackio=read_trackio())
        if AIM:
            found.update(aim=read_aim(folder))
        for part, project in ((log_oddly, "odd"), (begin_again, "again")):
            copy_tables(Path(folder), Path(folder).parent / part.__name__ / project / "mlflow.db")
        copy_tables(Path(folder), Path(folder) / "store" / "mlflow.db")
    acc.wait_for_everyone()
    with nullcontext() if acc.is_main_process else serve(Path(folder) / "store") as own:
        uri = acc.gather_object(own)[1]
        acc = Accelerator(cpu=True, project_dir=folder, log_with="mlflow")
        acc.init_trackers("served", config=CONFIG, init_kwargs={"mlflow": {"tracking_uri": uri}})
        loop(acc, folder)
        if acc.is_main_process:
            found.update(server=read_mlflow("served"))
        acc.wait_for_everyone()
    return found


def loop(acc: Accelerator, folder: str) -> None:
    for step in range(3):
        with acc.track("eval") as block:
            block.count("samples", 4)
        acc.log({"loss": torch.tensor(float(step + acc.process_index))}, step=step, reduce="mean")
    acc.log({"diverged": float("nan")}, step=3)
    acc.log_images({"picture": torch.rand(3, 6, 7)}, step=3)
    acc.log_table("scores", ["name", "score"], [["a", 1.5], ["b", 2.5]], step=3)
    path = Path(folder) / f"notes-{acc.process_index}.txt"
    path.write_text("kept")
    acc.log_artifact(path)
    acc.end_training()


def read_mlflow(project: str) -> dict[str, Any]:
    """The newest run of the store that is set."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    folders = ("images", "tables", "files")
    return {
        "losses": [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")],
        "diverged": [str(one.value) for one in client.get_metric_history(run.info.run_id, "diverged")],
        "samples": [one.value for one in client.get_metric_history(run.info.run_id, "eval/samples")],
        "params": dict(run.data.params),
        "tags": dict(run.data.tags),
        "status": run.info.status,
        "files": sorted(file.path for one in folders for file in client.list_artifacts(run.info.run_id, one)),
    }


def read_trackio() -> dict[str, Any]:
    """The newest run of the project."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("proj")
    logs = SQLiteStorage.get_logs("proj", run.name)
    return {
        "losses": [(one["step"], one["loss"]) for one in logs if "loss" in one],
        "config": {"lr": run.config["lr"], "python": run.config["system"]["python"]},
        "kinds": sorted(
            {value["_type"] for one in logs for value in one.values() if isinstance(value, dict)}
        ),
    }


def read_aim(folder: str) -> dict[str, Any]:
    """The one run of the repository, opened again: lists of runs know it only after `aim storage reindex`."""
    import aim
    from aim.storage.context import Context

    (name,) = aim.Repo(folder).list_all_runs()
    run, empty = aim.Run(name, repo=folder, capture_terminal_logs=False, **AIM["aim"]), Context({})
    losses = run.get_metric("loss", empty).dataframe()
    found = {
        "losses": list(zip(losses["step"].tolist(), losses["value"].tolist(), strict=True)),
        "config": run["hparams"],
        "experiment": run.experiment,
        "picture": [
            one.size for _, many in run.get_image_sequence("picture", empty).values.items() for one in many
        ],
        "scores": [one.data for _, one in run.get_text_sequence("scores", empty).values.items()],
    }
    run.close()
    return found


@dataclass(frozen=True)
class Logged:
    """What a rank's parts came to, and where."""

    folder: Path
    """Of all parts, in a folder each."""
    main: dict[str, Any]
    """Of rank 0, by part."""
    other: dict[str, Any]
    said: str
    """By rank 0 in all parts."""


def copy_tables(folder: Path, target: Path) -> None:
    """Of the database that MLflow has made in `train`: each takes seconds to make."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "proj" / "mlflow.db", target)


def log_all(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in (train, log_oddly, begin_again, log_at_once):
        found[part.__name__] = part(f"{folder}/{part.__name__}")
    return found


@pytest.fixture(scope="module")
def logged(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("project")
    variables = {**VARIABLES, "TRACKIO_DIR": str(folder / "trackio")}
    run = launch(log_all, str(folder), num_processes=2, env=variables, stall_after=0)
    main, other = run.result(800)
    return Logged(folder, main, other, run.logs(0))


LOSSES = [(0, 0.5), (1, 1.5), (2, 2.5)]


def test_packages_are_imported_on_the_main_process_only_and_when_started(logged: Logged) -> None:
    main, other = logged.main["train"], logged.other["train"]
    assert main["imported"] == [*PACKAGES]
    # what this process has imported for another test is there before the ranks begin
    assert other["imported"] == other["before"] == main["before"] != main["imported"]
    assert other["kinds"] == {"Absent"}


@pytest.mark.parametrize("place", ["mlflow", "server"])
def test_mlflow_holds_metrics_parameters_system_and_files(logged: Logged, place: str) -> None:
    found = logged.main["train"][place]
    assert found["losses"] == LOSSES
    assert found["diverged"] == ["nan"]
    assert sorted(found["samples"]) == [4.0, 8.0]  # two blocks before step 1 was logged, one after
    assert found["params"] == {"lr": "0.1", "net.width": "8"}
    assert found["tags"]["system.python"] == sys.version.split()[0]
    assert found["status"] == "FINISHED"
    assert found["files"] == ["files/notes-0.txt", "images/picture-3.png", "tables/scores-3.json"]


def test_trackio_database_holds_metrics_configuration_and_media(logged: Logged) -> None:
    found = logged.main["train"]["trackio"]
    assert found["losses"] == LOSSES
    assert found["config"] == {"lr": 0.1, "python": sys.version.split()[0]}
    assert found["kinds"] == ["trackio.image", "trackio.table"]


@pytest.mark.skipif(not AIM, reason="Aim has no wheel for this Python")
def test_aim_repository_holds_metrics_configuration_and_media(logged: Logged) -> None:
    found = logged.main["train"]["aim"]
    assert found["losses"] == LOSSES
    assert (found["experiment"], found["config"]) == ("proj", CONFIG)
    assert found["picture"] == [(7, 6)]
    assert found["scores"] == ["name\tscore\na\t1.5\nb\t2.5"]


def test_comet_archive_holds_metrics_and_parameters(logged: Logged) -> None:
    (archive,) = (logged.folder / "train" / "proj").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line) for line in opened.read("messages.json").splitlines()]
    metrics = [one["payload"]["metric"] for one in messages if one["type"] == "metric_msg"]
    losses = [(one["step"], one["metricValue"]) for one in metrics if one["metricName"] == "loss"]
    assert losses == LOSSES
    assert '"net.width"' in json.dumps(messages)
    assert "scores-3.csv" in json.dumps(messages)


def test_wandb_run_holds_metrics_configuration_and_media(logged: Logged) -> None:
    (file,) = (logged.folder / "train" / "proj" / "wandb").glob("offline-run-*/run-*.wandb")
    history, config = read_wandb(file)
    assert [(int(one["_step"]), float(one["loss"])) for one in history if "loss" in one] == LOSSES
    assert config["lr"] == "0.1"
    assert json.loads(config["system"])["num_processes"] == 2
    media = file.parent / "files" / "media"
    assert len(list(media.rglob("picture_*.png"))) == 1
    assert len(list(media.rglob("scores_*.table.json"))) == 1


def read_wandb(path: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """History and configuration of an offline run. Records in blocks of 32 KiB, as LevelDB's log has them, after a
    header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    history: list[dict[str, str]] = []
    config: dict[str, str] = {}
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                history.append({"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item})
            config.update({item.key: item.value_json for item in record.config.update})
            config.update({item.key: item.value_json for item in record.run.config.update})
    return history, config


def test_files_and_tensorboard_hold_the_same(logged: Logged) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = logged.folder / "train" / "proj"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one["loss"]) for one in lines if "loss" in one] == LOSSES
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,time,")
    assert (folder / "tables" / "scores-3.csv").read_text().splitlines() == ["name,score", "a,1.5", "b,2.5"]
    assert (folder / "files" / "notes-0.txt").read_text() == "kept"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == LOSSES
    assert [(one.width, one.height) for one in events.Images("picture")] == [(7, 6)]
    assert {"system/cpu_percent", "system/memory_percent"} <= set(events.Tags()["scalars"])
    assert "scores/text_summary" in events.Tags()["tensors"]


def log_oddly(folder: str) -> dict[str, list[float]]:
    """What packages do not like: files that change or go, values and columns of no type; then prints."""
    acc = Accelerator(cpu=True, project_dir=folder, log_with="all")
    acc.init_trackers("odd", init_kwargs={"wandb": {"mode": "offline"}, "comet_ml": {"online": False}, **AIM})
    acc.log(
        {"none": None, "empty": torch.tensor([]), "net": {"a": {"b": 1.0}, "s": "x"}, "loss": 2.0}, step=0
    )
    acc.log({"none": None, "loss": 1.0}, step=1)
    acc.log({"/rooted": 3.0, "x" * 260: 4.0, **{f"many/{number}": 1.0 for number in range(1200)}}, step=2)
    acc.log_table("mixed", ["a", "b"], [[1, None], ["x", 2.5]], step=1)
    with tempfile.TemporaryDirectory() as place:
        file, model = Path(place) / "now.txt", Path(place) / "model"
        (model / "deep").mkdir(parents=True)
        for name in ("first", "second"):
            for path in (file, model / "deep" / "x.txt"):
                path.write_text(name)
            acc.log_artifact(file, name=f"{name}.txt")
            acc.log_artifact(model, name=f"models/{name}")
    acc.log_artifact(folder, name="all")
    acc.end_training()
    for stream in (sys.stdout, sys.stderr):  # several trackers had wrapped them
        print("still printed", file=stream)
    if not acc.is_main_process:
        return {}
    return {**read_odd_mlflow(), **(read_odd_aim(folder) if AIM else {})}


def read_odd_mlflow() -> dict[str, list[float]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("odd")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    found = run.data.metrics
    many = [value for name, value in found.items() if name.startswith("many/")]
    return {"mlflow": [found["net.a.b"], found["loss"], found["rooted"], float(len(many))]}


def read_odd_aim(folder: str) -> dict[str, list[float]]:
    import aim
    from aim.storage.context import Context

    (name,) = aim.Repo(folder).list_all_runs()
    run = aim.Run(name, repo=folder, capture_terminal_logs=False, **AIM["aim"])
    found = {
        key: run.get_metric(key, Context({})).dataframe()["value"].tolist() for key in ("loss", "net/a/b")
    }
    run.close()
    return found


@pytest.fixture
def odd(logged: Logged) -> Path:
    """Where the project's trackers wrote it."""
    return logged.folder / "log_oddly" / "odd"


def test_console_is_whole_after_all_trackers_have_ended(logged: Logged) -> None:
    assert logged.said.count("still printed") == 2
    assert "RecursionError" not in logged.said


def test_value_a_package_does_not_take_is_named_once_and_the_others_are_kept(
    logged: Logged, odd: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = logged.main["log_oddly"]
    assert found["mlflow"] == [1.0, 1.0, 3.0, 1200.0]  # beside what a package does not take
    assert not AIM or (found["loss"], found["net/a/b"]) == ([2.0, 1.0], [1.0])
    said = logged.said
    assert said.count("tracker 'tensorboard' does not take 'empty'") == 1
    assert said.count("tracker 'aim' does not take 'none'") == len(AIM)
    assert said.count("tracker 'mlflow' does not take 'none' (TypeError: its metrics are numbers") == 1
    assert said.count("its names have 1 to 250 characters") == 1
    # of no package as a whole, but for those whose runs the script itself had ended, in the next part
    assert sorted(re.findall(r"'(\w+)' failed \(", said)) == ["comet_ml", "wandb"]
    events = EventAccumulator(str(odd))
    events.Reload()
    assert [one.value for one in events.Scalars("loss")] == [2.0, 1.0]
    assert "net/s/text_summary" in events.Tags()["tensors"]
    (file,) = odd.glob("net_a.b/events.*")
    nested = EventAccumulator(str(file))
    nested.Reload()
    assert [one.value for one in nested.Scalars("net")] == [1.0]


def test_mlflow_files_are_those_of_the_call_under_their_names(odd: Path) -> None:
    (files,) = (odd / "artifacts").glob("*/artifacts/files")
    found = [path for path in files.rglob("*.txt") if files / "all" not in path.parents]
    kept = {str(path.relative_to(files)): path.read_text() for path in found}
    names = ("first", "second")
    expected = {f"{name}.txt": name for name in names} | {f"models/{name}/deep/x.txt": name for name in names}
    assert kept == expected
    # the folder around it is there without what was logged before
    assert (files / "all" / "odd" / "metrics.jsonl").exists()
    assert not (files / "all" / "odd" / "artifacts").exists()


def test_comet_files_are_those_of_the_call_under_their_names(odd: Path) -> None:
    (archive,) = odd.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line)["payload"] for line in opened.read("messages.json").splitlines()]
        kept = {
            one["additional_params"]["fileName"]: opened.read(Path(one["file_path"]).name).decode()
            for one in messages
            if one.get("upload_type") == "asset"
            and str(one["additional_params"]["fileName"]).endswith(".txt")
        }
    names = ("first", "second")
    expected = {f"{name}.txt": name for name in names} | {f"models/{name}/deep/x.txt": name for name in names}
    assert {name: text for name, text in kept.items() if not name.startswith("all/")} == expected


def test_wandb_takes_a_table_with_a_column_of_several_types(odd: Path) -> None:
    (file,) = (odd / "wandb").glob("offline-run-*/files/media/table/mixed_*.table.json")
    assert json.loads(file.read_text())["data"] == [[1, None], ["x", 2.5]]


def begin_again(folder: str) -> dict[str, list[Any]]:
    """What a cell does that is run three times: the Accelerator of its first time is gone, that of the second is still
    there, and outlives that of the third. Then what the runs hold."""
    kept, runs = [], []
    for number in range(3):
        acc = Accelerator(cpu=True, project_dir=folder, log_with=["wandb", "mlflow", "comet_ml"])
        acc.init_trackers("again", init_kwargs={"wandb": {"mode": "offline"}, "comet_ml": {"online": False}})
        if acc.is_main_process:
            names = [acc.get_tracker(name, unwrap=True) for name in ("wandb", "mlflow", "comet_ml")]
            runs.append(identify(*names))
            assert identify(*running()) == runs[-1]
            del names
        acc.log({"loss": float(number)}, step=number)
        if number == 1:
            kept.append(acc)
        main = acc.is_main_process
        del acc
    gc.collect()
    assert not main or running()[0].id == runs[1][0]
    kept[0].log({"loss": 9.0}, step=9)
    if main:
        import wandb

        wandb.finish()
    kept[0].log({"loss": 10.0}, step=10)
    kept[0].end_training()
    return {"runs": runs, "mlflow": read_again(runs)} if main else {}


def running() -> tuple[Any, ...]:
    """The runs that the packages' own functions act on."""
    import comet_ml
    import mlflow
    import wandb

    return wandb.run, mlflow.active_run(), comet_ml.get_running_experiment()


def identify(wandb_run: Any, mlflow_run: Any, experiment: Any) -> tuple[str, str, str]:
    return wandb_run.id, mlflow_run.info.run_id, experiment.get_key()


def read_again(runs: list[Any]) -> list[Any]:
    import mlflow
    import wandb

    assert wandb.run is None
    client = mlflow.MlflowClient()
    return [
        ([one.value for one in client.get_metric_history(run, "loss")], client.get_run(run).info.status)
        for _, run, _ in runs
    ]


def test_run_that_is_begun_again_in_one_process_has_a_history_of_its_own(logged: Logged) -> None:
    found, place = logged.main["begin_again"], logged.folder / "begin_again" / "again"
    assert "could not be started" not in logged.said
    assert "'wandb' failed (UsageError: Run" in logged.said  # the script had finished it
    assert "'comet_ml' failed (RuntimeError: its experiment has ended" in logged.said
    assert found["mlflow"] == [([0.0], "FINISHED"), ([1.0, 9.0, 10.0], "FINISHED"), ([2.0], "FINISHED")]
    for kind in zip(*found["runs"], strict=True):
        assert len(set(kind)) == 3
    kept = [
        float(one["loss"])
        for name, _, _ in found["runs"]
        for file in (place / "wandb").glob(f"offline-run-*-{name}/run-*.wandb")
        for one in read_wandb(file)[0]
        if "loss" in one
    ]
    assert kept == [0.0, 1.0, 9.0, 2.0]
    assert len(list(place.glob("*.zip"))) == 3


def log_at_once(folder: str) -> str:
    """As a trial of a sweep that starts MLflow when the other does."""
    import mlflow  # the slow part

    acc = Accelerator(cpu=True)
    acc.wait_for_everyone()
    trackers = open_trackers(["mlflow"], folder=Path(folder), project="sweep", world=single())
    trackers.log({"number": acc.process_index}, 1)
    trackers.finish()
    return str(mlflow.get_tracking_uri())


def test_trials_that_begin_at_once_are_all_in_the_database(logged: Logged) -> None:
    uris = {logged.main["log_at_once"], logged.other["log_at_once"]}
    with closing(sqlite3.connect(uris.pop().removeprefix("sqlite:///"))) as database:
        held = database.execute(
            "select value from latest_metrics where key = 'number' order by value"
        ).fetchall()
    assert not uris
    assert held == [(0.0,), (1.0,)]


class Told:
    """A tracker of a user that writes how the run ended."""

    name = "told"

    def __init__(self, path: str) -> None:
        self.tracker = Path(path)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise OSError("no room")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        raise RuntimeError("broken")

    def finish(self) -> None:
        self.tracker.write_text("finished")

    def finish_failed(self) -> None:
        self.tracker.write_text("failed")


def end(path: str, how: str) -> None:
    acc = Accelerator(cpu=True, log_with=[Told(path)])
    acc.init_trackers("p", config={"lr": 0.1})
    for step in range(50):  # quicker than the dashboard is told
        acc.log({"loss": 1.0 / (step + 1)}, step=step)
    if how == "raise":
        raise ValueError("diverged")
    if how == "wait":
        print("all is logged", flush=True)
        time.sleep(120)


@pytest.mark.parametrize(("how", "told"), [("raise", "failed"), ("wait", "failed"), ("return", "finished")])
def test_tracker_is_told_how_a_run_ended_that_never_said_so(
    warm: None, tmp_path: Path, how: str, told: str
) -> None:
    path = tmp_path / "told"
    run = launch(end, str(path), how, num_processes=1)
    if how == "wait":
        wait_until(lambda: "all is logged" in run.logs(0), 60, "the loop's end")
        run.interrupt()
    try:
        run.result(60)
    except (WorkerError, KeyboardInterrupt):
        assert how != "return"
    assert path.read_text() == told
    assert run.state.ranks[0].curves["loss"].last == (49, 0.02)
    assert run.logs(0).count("tracker 'told' failed (") == 1  # at its first call, whatever came after
