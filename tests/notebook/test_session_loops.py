"""An Accelerator's loop in a session, run again after a stop, and after interrupts at different places of the ranks."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbaccel import Session
from tests.conftest import wait_until

pytestmark = pytest.mark.timeout(120)

LOOP = """
import time, torch
from torch.utils.data import DataLoader, TensorDataset
from nbaccel import Accelerator

acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
inputs = torch.randn(12_000, 4)
data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=1, shuffle=True)
model, optimizer, data = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), data)


def train(most=None, nap=None):
    # nap: the rank that stays behind, its micro-step, the line it sleeps at, and the file that says so
    micro = 0
    for x, y in data:
        with acc.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y)
            stay_behind(nap, micro, "before backward")
            acc.backward(loss)
            stay_behind(nap, micro, "before step")
            optimizer.step()
            optimizer.zero_grad()
        micro += 1
        if micro == most:
            break
    return micro, acc.stopped_early, data.epoch


def stay_behind(nap, *place):
    if nap is not None and nap[:-1] == (rank, *place):
        open(nap[-1], "w").close()
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Session]:
    with Session(3, device="cpu", grace=3, stall_after=0) as one:
        yield one


@pytest.fixture
def session(ranks: Session) -> Session:
    ranks.execute(LOOP)
    return ranks


def stopped(session: Session) -> tuple[int, bool, int]:
    """What every rank says of a loop that was stopped after a while; the same."""
    run = session.submit(call, "train")
    wait_until(lambda: run.state.options, 30, "the loop listens")
    time.sleep(0.3)
    run.stop()
    first, *rest = run.result(timeout=30)
    assert [first] * len(rest) == rest
    assert re.search(r"3 ranks on cpu · stopped after step \d+", run.report().text)
    return first


def call(name: str, *args: object) -> object:
    import __main__

    return getattr(__main__, name)(*args)


def test_loop_that_was_stopped_trains_again_in_a_later_call(session: Session) -> None:
    for _ in range(2):
        micro_steps, early, _ = stopped(session)
        assert micro_steps > 0
        assert early
    session.execute("told = acc.stopped_early, acc.should_stop")
    assert session.pull("told") == [(True, False)] * 3
    assert session.run(call, "train", 4) == [(4, False, 2)] * 3
    session.execute("told = acc.stopped_early")
    assert session.pull("told") == [False] * 3


@pytest.mark.parametrize("micro", [0, 1, 5])
def test_ranks_stop_together_when_an_interrupt_left_them_at_different_places(
    session: Session, micro: int, tmp_path: Path
) -> None:
    if micro:  # the replicas are not equal then, as the session says
        session.execute(LOOP.replace("Accelerator(", "Accelerator(verify=False, "))
    for place in ("before backward", "before step"):
        interrupt_behind(session, (1, micro, place), tmp_path / place)
    micro_steps, early, _ = stopped(session)
    assert micro_steps > 0
    assert early


def test_ranks_go_on_with_the_epoch_of_the_one_that_came_furthest(session: Session, tmp_path: Path) -> None:
    session.execute("if rank == 2: data.set_epoch(4)")  # as if it had begun a pass that others were kept from
    interrupt_behind(session, (0, 0, "before backward"), tmp_path / "there")
    assert session.run(call, "train", 4) == [(4, False, 5)] * 3


def interrupt_behind(session: Session, place: tuple[int, int, str], there: Path) -> None:
    """Interrupt a loop in which one rank stays behind."""
    run = session.submit(call, "train", None, (*place, str(there)))
    wait_until(there.exists, 30, "the rank is there")
    time.sleep(0.3)  # the others go on to where they wait for it
    run.interrupt()
    with pytest.raises(KeyboardInterrupt, match=f"rank {place[0]} was at"):
        run.result(timeout=30)
