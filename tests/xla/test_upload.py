"""The loader's batches reach XLA devices ahead of the loop, by a thread, and change no graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import Accelerator, Session, launch
from tests.xla import one_at_a_time

pytestmark = pytest.mark.slow

BATCH, BATCHES = 4, 5
EPOCHS = 3


def counter(name: str) -> int:
    import torch_xla

    return int(torch_xla._XLAC._xla_counter_value(name) or 0)


def compiled() -> int:
    return counter("UncachedCompile")


def executed() -> int:
    import torch_xla

    torch_xla._XLAC._xla_wait_device_ops([])
    return int((torch_xla._XLAC._xla_metric_data("ExecuteTime") or (0,))[0])


def watch_uploads() -> list[str]:
    """The threads that upload from now on; as a rank's process has several ranks, only this one's."""
    import torch_xla

    native, seen = torch_xla._XLAC, []
    device, original = str(torch_xla.device()), native._xla_tensors_from_aten

    def upload(tensors: Any, devices: Any, shardings: Any) -> Any:
        if devices[0] == device:
            seen.append(threading.current_thread().name)
        return original(tensors, devices, shardings)

    native._xla_tensors_from_aten = upload
    return seen


def train(ahead: bool) -> dict[str, Any]:
    """Epochs by the loader, or by hand without a thread: batches' sums, parameters, what was compiled and run."""
    one_at_a_time.install()
    acc = Accelerator(verify=False)
    with one_at_a_time.alone():  # replicas share the generator
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        uploads = watch_uploads()
    rows = torch.arange(3.0 * BATCH * BATCHES * acc.num_processes).view(-1, 3) / 100
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(TensorDataset(rows, rows[:, :2]), BATCH)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    batches = loader if ahead else [[part.cpu() for part in batch] for batch in loader]
    uploads.clear()
    acc.wait_for_everyone()
    before, seen = (compiled(), executed()), []
    acc.wait_for_everyone()
    for _ in range(EPOCHS):
        for batch in batches:
            features, wanted = (part.to(acc.device) for part in batch)
            acc.step((model(features) - wanted).pow(2).mean(), optimizer)
            seen.append(batch[0].cpu())
    acc.wait_for_everyone()
    after = compiled(), executed()
    acc.wait_for_everyone()
    return {
        "compiled": after[0] - before[0],
        "executed": after[1] - before[1],
        "seen": [one.tolist() for one in seen],
        "threads": sorted(set(uploads)),
        "count": len(uploads),
        "parameters": torch.cat([p.detach().cpu().flatten() for p in model.parameters()]),
    }


def both_ways() -> tuple[dict[str, Any], dict[str, Any]]:
    return train(False), train(True)


@pytest.fixture(scope="module")
def pair() -> Iterator[Session]:
    with Session(num_processes=2, device="tpu", stall_after=0) as session:
        yield session


def test_batches_are_uploaded_by_a_thread_and_no_other_graph_is_compiled(pair: Session) -> None:
    check(pair.run(both_ways), 2)


def test_one_replica_has_its_batches_by_a_thread_too() -> None:
    check(launch(both_ways, num_processes=1, device="tpu", stall_after=0).result(timeout=240), 1)


def check(found: Sequence[tuple[dict[str, Any], dict[str, Any]]], replicas: int) -> None:
    for plain, ahead in found:
        assert ahead["threads"] == ["nbaccel-upload_0"]
        assert ahead["count"] == EPOCHS * BATCHES
        assert (plain["threads"], plain["count"]) == ([], 0)
        assert len(ahead["seen"]) == EPOCHS * BATCHES
        assert ahead["seen"] == plain["seen"]
        assert plain["compiled"] > 0
        assert ahead["compiled"] == 0, "every graph was there"
        assert ahead["executed"] == plain["executed"] == EPOCHS * BATCHES * replicas
        assert torch.equal(ahead["parameters"], plain["parameters"])


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, broken: range = range(0)) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise OSError("disk")
        return torch.tensor(float(index))


def left() -> dict[str, Any]:
    """A loop left early and one that goes on from there; one over broken data; the threads that are left."""
    acc = Accelerator(verify=False)

    def loader(**options: Any) -> Any:
        return acc.prepare(DataLoader(Rows(**options), 2, shuffle=not options))

    first, whole = loader(), []
    for batch in first:
        whole.append(batch.cpu().tolist())
    cut, taken = loader(), []
    for batch in cut:
        taken.append(batch.cpu().tolist())
        if len(taken) == 2:
            break
    state = cut.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    taken += [batch.cpu().tolist() for batch in resumed]
    broken, before = loader(broken=range(12, 16)), 0
    try:
        for _ in broken:
            before += 1
        error = ""
    except OSError as found:
        error = str(found)
    acc.wait_for_everyone()
    alive = [one for one in threading.enumerate() if one.name.startswith("nbaccel-upload")]
    for one in alive:
        one.join(20)
    return {
        "same": taken == whole,
        "samples": sum(map(len, taken)),
        "broken": (before, error, broken.position),
        "alive": sum(one.is_alive() for one in alive),
    }


def test_a_loop_left_early_or_broken_counts_what_it_took_and_leaves_no_thread(pair: Session) -> None:
    for one in pair.run(left):
        assert (one["same"], one["samples"], one["alive"]) == (True, 12, 0)
        assert one["broken"] == (3, "disk", 12)
