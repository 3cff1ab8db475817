"""Training on XLA devices is training on the CPU: on one, and on replicas whose gradients are averaged there."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import Accelerator, LocalSGD, Session, launch
from tests.xla import one_at_a_time

pytestmark = pytest.mark.slow

SAMPLES, BATCH = 24, 12


class Trained(NamedTuple):
    model: nn.Module
    device: str
    error: float
    count: int
    """Samples the error is a mean of."""
    steps: int


def parts() -> tuple[Any, Any, TensorDataset]:
    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    model = nn.Sequential(tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(SAMPLES, 4, generator=generator), torch.randn(SAMPLES, 3, generator=generator)
    )
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), data


def train(accumulation: int, precision: str | None, folder: str, *, load: bool = False) -> Trained:
    """Two epochs, then the mean error over all samples."""
    one_at_a_time.install()
    acc = Accelerator(
        gradient_accumulation_steps=accumulation, mixed_precision=precision, project_dir=folder, verify=False
    )
    with one_at_a_time.alone():  # replicas share the generator
        model, optimizer, data = parts()
    loader: Any = DataLoader(data, batch_size=BATCH // accumulation // acc.num_processes)
    scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    if load:
        acc.load_state(os.path.join(folder, "saved"))
    for _ in range(2):
        for features, wanted in loader:
            with acc.accumulate(model):
                loss = (model(features) - wanted).pow(2).mean()
                acc.backward(loss)
                acc.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    errors = []
    with torch.no_grad():
        for features, wanted in loader:
            errors.append(acc.gather_for_metrics((model(features) - wanted).pow(2).mean(1)).cpu())
    if not load:
        acc.save_state(os.path.join(folder, "saved"))
    unwrapped: Any = acc.unwrap_model(model)
    assert unwrapped[0].weight is unwrapped[2].weight
    found = torch.cat(errors)
    return Trained(unwrapped, str(features.device), found.mean().item(), len(found), acc.steps)


def plain(epochs: int = 2) -> nn.Module:
    """The same in one process of plain torch."""
    model, optimizer, data = parts()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    for _ in range(epochs):
        for features, wanted in DataLoader(data, batch_size=BATCH):
            (model(features) - wanted).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pair() -> Iterator[Session]:
    """Two replicas for all tests that need two: a launch imports torch_xla anew."""
    with Session(num_processes=2, device="tpu", stall_after=0) as session:
        yield session


def run(place: Session | str, *call: Any, **kwargs: Any) -> list[Trained]:
    """On the two replicas, or on two ranks of a device."""
    if isinstance(place, Session):
        return list(place.run(train, *call, **kwargs))
    return list(launch(train, *call, num_processes=2, device=place, kwargs=kwargs).result(timeout=240))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 2), (4, 1)])
def test_replicas_train_as_plain_torch_does(replicas: int, accumulation: int, tmp_path: Path) -> None:
    call = train, accumulation, None, str(tmp_path)
    started = launch(*call, num_processes=replicas, device="tpu", stall_after=0)
    check(started.result(timeout=240), replicas)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_replicas_train_as_plain_torch_does(accumulation: int, pair: Session, tmp_path: Path) -> None:
    check(run(pair, accumulation, None, str(tmp_path)), 2)


def check(found: Sequence[Trained], replicas: int) -> None:
    assert [one.device for one in found] == [f"xla:{index}" for index in range(replicas)]
    for one in found:
        assert torch.equal(flat(one.model), flat(found[0].model))
        assert (one.count, one.error, one.steps) == (SAMPLES, found[0].error, 4)
    torch.testing.assert_close(flat(found[0].model), flat(plain()), rtol=0, atol=1e-6)


def test_checkpoints_of_replicas_and_of_the_cpu_are_loaded_on_the_other(
    pair: Session, tmp_path: Path
) -> None:
    """Momentum and schedule too: going on is what plain torch does in one go."""
    for number, (place, other) in enumerate(((pair, "cpu"), ("cpu", pair))):
        run(place, 1, None, str(tmp_path / str(number)))
        again = run(other, 1, None, str(tmp_path / str(number)), load=True)
        torch.testing.assert_close(flat(again[0].model), flat(plain(epochs=4)), rtol=0, atol=1e-6)


def test_bf16_computes_as_on_the_cpu(pair: Session, tmp_path: Path) -> None:
    models = [run(place, 1, "bf16", str(tmp_path))[0].model for place in ("cpu", pair)]
    assert {parameter.dtype for parameter in models[1].parameters()} == {torch.float32}
    torch.testing.assert_close(flat(models[1]), flat(models[0]), rtol=0, atol=2e-2)


def exchange() -> dict[str, Any]:
    one_at_a_time.install()
    acc = Accelerator()
    mine = torch.arange(2.0, device=acc.device) + 10 * acc.process_index
    ragged = torch.ones(acc.process_index + 1, 2, device=acc.device)
    padded = acc.pad_across_processes(ragged)
    values = {
        "gather": acc.gather(mine),
        "sum": acc.reduce(mine, "sum"),
        "mean": acc.reduce({"x": mine}, "mean")["x"],
        "broadcast": acc.broadcast(mine, from_process=1),
        "padded": padded,
    }
    places = {value.device for value in values.values()}
    assert places == {acc.device}, places
    model = acc.unwrap_model(acc.prepare(nn.Linear(2, 2)))
    average = copy.deepcopy(model)  # while the ranks are still compared
    return {"models": (model, average), **{name: value.cpu().tolist() for name, value in values.items()}}


def runtime_runs() -> bool:
    native = getattr(sys.modules.get("torch_xla"), "_XLAC", None)
    return native is not None and native._xla_runtime_is_initialized()  # type: ignore[no-any-return]


def test_collectives_of_replicas_and_models_they_return() -> None:
    started = launch(exchange, num_processes=2, device="tpu", stall_after=0)
    found = list(started.result(timeout=240))
    assert "is connected to" not in "".join(map(started.logs, range(2))), "gloo's lines, of torch 2.9"
    for rank, one in enumerate(found):
        assert one["gather"] == [0.0, 1.0, 10.0, 11.0]
        assert one["sum"] == [10.0, 12.0]
        assert one["mean"] == [5.0, 6.0]
        assert one["broadcast"] == [10.0, 11.0]
        assert one["padded"] == [[1.0, 1.0], [float(rank)] * 2]
        for model in one["models"]:
            with torch.no_grad():
                for _ in range(3):
                    assert model(torch.ones(1, 2)).device.type == "cpu"
            assert torch.equal(flat(pickle.loads(pickle.dumps(model))), flat(found[0]["models"][0]))
    assert not runtime_runs(), "a model that was returned opens the kernel's chips"


def few_steps(kind: str) -> list[float]:
    """The weights after two steps with the gradients of one `kind` of backward, on a rank's own inputs."""
    acc = Accelerator(verify=False)
    with one_at_a_time.alone():
        torch.manual_seed(0)
        model: Any = nn.Linear(2, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    with LocalSGD(acc, model, 2, enabled=kind == "local") as local:
        for step in range(2):
            loss = rank_loss(model, step, acc.process_index, acc.device)
            if kind == "weighted":
                acc.backward(loss, weight=torch.tensor(3.0 + acc.process_index).to(acc.device))
            elif kind == "local":
                acc.backward(loss)
            else:
                loss.backward()
            if kind == "clipped":
                acc.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    found: list[float] = model.weight.detach().cpu().flatten().tolist()
    return found


def rank_loss(model: Any, step: int, rank: int, device: Any = "cpu") -> torch.Tensor:
    loss: torch.Tensor = model(torch.full((2, 2), 1.0 + step + rank).to(device)).pow(2).sum()
    return loss


def by_hand(kind: str) -> list[float]:
    """The same in one process, which computes both ranks' losses."""
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Linear(2, 1))
    for step in range(2):
        losses = [rank_loss(model, step, rank) for rank, model in enumerate(models)]
        grads = [
            torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, models, strict=True)
        ]
        shared = [sum(pair) / (7.0 if kind == "weighted" else 2.0) for pair in zip(*grads, strict=True)]
        if kind == "clipped":
            norm = torch.stack([grad.norm() for grad in shared]).norm()
            shared = [grad * min(1.0, float(1.0 / (norm + 1e-6))) for grad in shared]
        for model, own in zip(models, grads, strict=True):
            for parameter, grad in zip(model.parameters(), own if kind == "local" else shared, strict=True):
                parameter.data -= 0.1 * grad
    return ((flat(models[0]) + flat(models[1])) / 2)[:2].tolist()


KINDS = ("plain", "clipped", "weighted", "local")


def each_kind() -> tuple[list[list[float]], str]:
    """The weights for each; what `torch.distributed` says to a tensor of the device."""
    one_at_a_time.install()
    weights = [few_steps(kind) for kind in KINDS]
    try:
        dist.all_reduce(torch.ones(1, device=Accelerator(verify=False).device))
    except RuntimeError as error:
        return weights, str(error)
    return weights, ""


def test_replicas_step_with_the_gradients_of_all_ranks_whatever_the_backward(pair: Session) -> None:
    for weights, refused in pair.run(each_kind):
        for kind, found in zip(KINDS, weights, strict=True):
            assert found == pytest.approx(by_hand(kind), abs=1e-6), kind
        assert "allreduce" in refused
        assert "XLA" in refused
