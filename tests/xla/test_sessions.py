"""A session of ranks that are threads of one process: they, and what they compiled, stay between the calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel import Accelerator, Session, notebook_launcher
from nbaccel.errors import ConfigError, WorkerError
from tests.xla import one_at_a_time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(num_processes=2, device="tpu", stall_after=0) as started:
        yield started


def train(scale: float) -> dict[str, Any]:
    """Three steps; the parameters' sum, and how many graphs were compiled meanwhile."""
    import torch_xla

    one_at_a_time.install()
    acc = Accelerator()
    acc.wait_for_everyone()
    before = torch_xla._XLAC._xla_counter_value("UncachedCompile") or 0
    acc.wait_for_everyone()
    with one_at_a_time.alone():  # replicas share the generator
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    for _ in range(3):
        acc.step(model(torch.full((2, 4), scale + acc.process_index).to(acc.device)).mean(), optimizer)
    total = sum(parameter.sum() for parameter in model.parameters()).item()
    acc.wait_for_everyone()
    compiled = (torch_xla._XLAC._xla_counter_value("UncachedCompile") or 0) - before
    return {"rank": acc.process_index, "compiled": int(compiled), "total": total}


def test_second_launch_compiles_nothing(session: Session) -> None:
    first, second, other = (notebook_launcher(train, (scale,), session=session) for scale in (1.0, 1.0, 2.0))
    assert [one["rank"] for one in first] == [0, 1]
    assert first[0]["compiled"] > 0
    assert [one["compiled"] for one in (*second, *other)] == [0] * 4
    assert first[0]["total"] == first[1]["total"] == second[0]["total"] != other[0]["total"]


def test_session_goes_on_after_a_failure_an_interrupt_and_the_loss_of_its_process(session: Session) -> None:
    def fails_on_one() -> None:
        acc = Accelerator()
        acc.wait_for_everyone()
        raise ValueError(f"on rank {acc.process_index}") if acc.process_index else KeyError("on rank 0")

    def waits() -> None:
        Accelerator()
        print("at work", flush=True)
        while True:
            time.sleep(0.01)

    def ends_the_process() -> None:
        acc = Accelerator()
        acc.wait_for_everyone()
        if acc.process_index:
            os._exit(3)
        time.sleep(60)

    def everyone() -> list[int]:
        acc = Accelerator()
        return acc.gather_object(acc.process_index)

    with pytest.raises(WorkerError, match="on rank"):
        session.run(fails_on_one)
    run = session.submit(waits)
    deadline = time.monotonic() + 60
    while any("at work" not in run.logs(rank) for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.interrupt()
    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=60)
    assert list(session.run(everyone)) == [[0, 1], [0, 1]]
    with pytest.raises(WorkerError, match="ranks 0-1 of 2 ended without a result, exit code 3"):
        session.run(ends_the_process)
    assert list(session.run(everyone)) == [[0, 1], [0, 1]]


def test_cells_are_refused(session: Session) -> None:
    with pytest.raises(ConfigError, match="need a process for each rank"):
        session.execute("x = 1")
    with pytest.raises(ConfigError, match="need a process for each rank"):
        session.push(x=1)
