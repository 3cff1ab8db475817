"""A session of ranks that are threads of one process: they, and what they compiled, stay between the calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel import Accelerator, Session, notebook_launcher
from nbaccel.errors import WorkerError
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


def shown(session: Session, source: str) -> list[str]:
    return [repr(value) for value in session.execute(source)]


def test_cells_have_the_variables_and_the_output_of_their_rank(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(session, "x = rank * 10\nprint('cell of', rank)\ndist.barrier()\nx, str(device)") == [
        "(0, 'xla:0')",
        "(10, 'xla:1')",
    ]
    printed = capsys.readouterr().out
    assert "[rank 0] cell of 0" in printed
    assert "[rank 1] cell of 1" in printed
    session.push(y=5)
    assert shown(session, "y += rank\nglobals() is get_ipython().user_ns, y")[0] == "(True, 5)"
    assert list(session.pull("y")) == [5, 6]
    assert list(session.pull("x", ranks=[1])) == [10]
    found = {rank: {one.name: one.value for one in named} for rank, named in session.variables().items()}
    assert found == {0: {"x": "0", "y": "5"}, 1: {"x": "10", "y": "6"}}


def test_cells_define_classes_and_functions_that_are_their_ranks_own(session: Session) -> None:
    session.execute(
        """
import dataclasses, pickle
@dataclasses.dataclass
class Place:
    rank: int
    __slots__ = ("rank",)
def here():
    return Place(rank)
"""
    )
    same = "dist.barrier()\nagain = pickle.loads(pickle.dumps(here()))\nagain, type(again) is Place"
    assert shown(session, same) == ["(Place(rank=0), True)", "(Place(rank=1), True)"]

    def called() -> int:
        import __main__

        return __main__.here().rank * 2  # type: ignore[attr-defined, no-any-return]

    assert list(session.run(called)) == [0, 2]


def test_cells_use_magics_await_and_displays_on_every_rank_at_once(session: Session) -> None:
    source = """
import asyncio, os
async def later():
    await asyncio.sleep(0.2)
    return rank
dist.barrier()
found = await later()
%env NBACCEL_CELL=here
listed = !echo $rank
from IPython import get_ipython as asked
dist.barrier()
found, list(listed), os.environ["NBACCEL_CELL"], asked() is get_ipython()
"""
    assert shown(session, source) == ["(0, ['0'], 'here', True)", "(1, ['1'], 'here', True)"]


def test_cells_are_their_ranks_own_again_after_magics_that_change_the_whole_process(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("from IPython import get_ipython\nasked = get_ipython().user_ns['rank']\n")
    session.execute("%%capture kept\nimport time\nprint('hidden')\ntime.sleep(rank / 20)")
    session.execute(f"%run {script}")
    capsys.readouterr()
    session.execute(
        """
import threading
import gc, weakref
gc.disable()
told = threading.Thread(target=lambda: print("thread of", rank))
told.start()
told.join()
told = weakref.ref(told)
kept = told() is not None
gc.enable()
"""
    )
    assert list(session.pull("kept")) == [False, False]
    printed = capsys.readouterr().out
    assert "hidden" not in printed
    assert "[rank 0] thread of 0" in printed
    assert "[rank 1] thread of 1" in printed
    assert shown(session, "import __main__\nasked, __main__.__dict__ is globals()") == [
        "(0, True)",
        "(1, True)",
    ]


def test_failing_cell_names_its_rank_and_line_and_keeps_variables(session: Session) -> None:
    session.execute("kept = rank")
    with pytest.raises(WorkerError, match="rank 1 of 2 failed: ZeroDivisionError") as failure:
        session.execute("before = 1\nkept / (1 - rank)")
    assert "kept / (1 - rank)" in str(failure.value)
    assert list(session.pull("kept")) == [0, 1]


def test_cells_train(session: Session) -> None:
    session.execute(
        """
import torch, torch_xla
from torch import nn
from nbaccel import Accelerator
from tests.xla import one_at_a_time
one_at_a_time.install()
acc = Accelerator(verify=False)
with one_at_a_time.alone():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
batch = torch.full((2, 4), 1.0 + rank).to(acc.device)
"""
    )
    step = "acc.step(model(batch).mean(), optimizer)"
    for _ in range(2):
        session.execute(step)
    count = "int(torch_xla._XLAC._xla_counter_value('UncachedCompile'))"
    before = shown(session, count)
    session.execute(step)
    assert shown(session, count) == before
    first, second = session.pull("model.weight")
    assert torch.equal(first, second)


def test_interrupted_training_goes_on_with_the_graph_it_had(session: Session) -> None:
    """Each rank hears of it elsewhere in a step; its next graphs must be those of the others all the same."""
    test_cells_train(session)

    def trains() -> None:
        import __main__

        names = vars(__main__)
        print("at work", flush=True)
        while True:
            names["acc"].step(names["model"](names["batch"]).mean(), names["optimizer"])

    def standing() -> tuple[int, int]:
        import torch_xla

        import __main__

        return vars(__main__)["acc"].steps, int(torch_xla._XLAC._xla_counter_value("UncachedCompile"))

    steps = "for _ in range(4): acc.step(model(batch).mean(), optimizer)"
    session.execute(steps)
    ((before, compiled), _) = session.run(standing)
    for _ in range(2):
        run = session.submit(trains)
        deadline = time.monotonic() + 60
        while not (run.state.options and "at work" in run.logs(1)) and time.monotonic() < deadline:
            time.sleep(0.02)
        run.interrupt()
        with pytest.raises(KeyboardInterrupt):
            run.result(timeout=60)
        session.execute(steps)
    made, *_ = standings = session.run(standing)
    assert made[0] > before + 8
    assert list(standings) == [(made[0], compiled)] * 2
    first, second = session.pull("model.weight")
    assert torch.equal(first, second)
