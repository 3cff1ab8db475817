"""A launch in a real Jupyter kernel: tracebacks, output in its cell, ■, SIGKILL of anything."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nbaccel.session.panel.ansi import plain
from nbaccel.session.reopen import PastRun
from tests.conftest import Kernel, gone, named, run_processes, wait_until

pytestmark = pytest.mark.kernel

SLEEP = """
import os, time
def work(seconds=60):
    print("at work", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """Another kernel beside the first."""
    started = Kernel(tmp_path_factory.mktemp("other"))
    yield started
    started.close()


def wait_run_ended(kernel: Kernel) -> None:
    wait_until(lambda: not run_processes(kernel.pid), 20, f"an end of {run_processes(kernel.pid)}")


def test_traceback_names_the_cell_when_its_function_raises(kernel: Kernel) -> None:
    kernel.ok("""
class Broken(Exception):
    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code

def inner(rank):
    if rank == 1:
        raise Broken(7)

def train():
    import os
    inner(int(os.environ["RANK"]))
""")
    cell = kernel.run("notebook_launcher(train, num_processes=2)")
    assert cell.error == "WorkerError"
    assert "Cell In[" in cell.traceback
    assert "inner(int(os.environ" in cell.traceback
    assert "raise Broken(7)" in cell.traceback
    assert "code 7" in cell.traceback
    assert "site-packages" not in cell.traceback
    assert len(cell.traceback.splitlines()) < 20
    cell = kernel.ok("""
try:
    notebook_launcher(train, num_processes=2)
except Exception as error:
    print(type(error.__cause__) is Broken, error.__cause__.code, error.ranks)
""")
    assert "True 7 (1,)" in cell.stdout
    wait_run_ended(kernel)


def test_launch_when_the_notebook_has_taken_ipython_s_names(kernel: Kernel) -> None:
    cell = kernel.ok("In = 5\nprint(list(notebook_launcher(lambda: 7, num_processes=1, device='cpu')))")
    assert "[7]" in cell.stdout
    assert cell.stderr == ""
    kernel.ok("In = get_ipython().history_manager.input_hist_parsed")


def test_traceback_when_something_asked_cannot_be_shows_the_person_s_lines_only(kernel: Kernel) -> None:
    kernel.ok("""
import threading
def f(x=0): return x
def helper(n): return notebook_launcher(f, num_processes=n)
class Bad:
    def __reduce__(self): return eval, ("1/0",)
def knob():
    from nbaccel import Accelerator
    Accelerator(cpu=True, mixed_precision="bf17")
""")
    cases = {
        "helper(-1)": (
            "ConfigError",
            "return notebook_launcher(f, num_processes=n)",
            "must be at least 1, not -1",
        ),
        "notebook_launcher(f, (threading.Lock(),), num_processes=2)": (
            "PayloadError",
            "Lock()",
            "args[0] is a",
        ),
        "notebook_launcher(f, (Bad(),), num_processes=2)": ("LaunchError", "Bad()", "could not be set up"),
        "notebook_launcher(knob, num_processes=2)": (
            "WorkerError",
            'precision="bf17")',
            "Did you mean 'bf16'?",
        ),
        "knob()": ("ConfigError", 'mixed_precision="bf17")', "Did you mean 'bf16'?"),
    }
    for code, (kind, line, said) in cases.items():
        cell = kernel.run(code)
        assert cell.error == kind, code
        shown = plain(cell.traceback)
        assert line in shown, shown
        assert said in shown, shown
        assert not re.search(r"(nbaccel|site-packages)/\S+\.py", shown), shown
    kernel.ok("%xmode Verbose")
    assert f"nbaccel{os.sep}config.py" in plain(kernel.run("helper(-1)").traceback)
    kernel.ok("%xmode Context")


def test_values_of_notebook_classes_are_its_own_when_returned(kernel: Kernel) -> None:
    cell = kernel.ok("""
import dataclasses
@dataclasses.dataclass
class Metrics:
    loss: float
offset = 10
add = lambda x: x + offset
def make(x):
    return Metrics(add(x))
values = notebook_launcher(make, (1,), num_processes=2)
print(values == [Metrics(11), Metrics(11)], isinstance(values[0], Metrics))
""")
    assert "True True" in cell.stdout


def test_notebook_classes_pickle_in_ranks_everywhere(kernel: Kernel) -> None:
    """pickle, torch.save, object collectives, and DataLoader workers of every start method."""
    cell = kernel.ok(
        """
import dataclasses
@dataclasses.dataclass
class Item:
    value: int
class Numbers:
    def __len__(self): return 4
    def __getitem__(self, i): return Item(i)
def keep(batch): return batch
def use():
    import io, os, pickle, torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    got = [None, None]
    dist.all_gather_object(got, Item(rank))
    assert got == [Item(0), Item(1)], got
    assert pickle.loads(pickle.dumps(Item(3))) == Item(3)
    file = io.BytesIO(); torch.save(Item(4), file); file.seek(0)
    assert torch.load(file, weights_only=False) == Item(4)
    options = dict(batch_size=2, num_workers=1, collate_fn=keep, timeout=60)
    for method in ("fork", "forkserver", "spawn")[: 3 if rank == 0 else 1]:
        loader = DataLoader(Numbers(), multiprocessing_context=method, **options)
        assert [item for batch in loader for item in batch] == [Item(i) for i in range(4)], method
    dist.barrier()
    dist.destroy_process_group()
    return Item(rank)
print(notebook_launcher(use, num_processes=2) == [Item(0), Item(1)])
""",
        timeout=120,
    )
    assert "True" in cell.stdout, cell.output
    wait_run_ended(kernel)


def test_output_is_in_the_launching_cell_when_later_cells_run(kernel: Kernel) -> None:
    first = kernel.ok("""
import time
def speak():
    for i in range(6):
        print("word", i, flush=True)
        time.sleep(0.15)
    return 1
run = launch(speak, num_processes=1)
""")
    second = kernel.ok("time.sleep(0.4); print('meanwhile')")
    third = kernel.ok("print(run.result())")
    kernel.settle()
    assert [line for line in first.stdout.splitlines() if line] == [f"word {i}" for i in range(6)]
    assert second.stdout == "meanwhile\n"
    assert third.stdout.strip() == "[1]"


def test_run_can_be_awaited_and_watched(kernel: Kernel) -> None:
    kernel.ok(SLEEP)
    cell = kernel.ok("""
run = launch(work, 1, num_processes=2)
print(run.done())
values = await run
print(values == [None, None], run.done(), run.exception())
""")
    assert cell.stdout.splitlines()[0] == "False"
    assert "True True None" in cell.stdout


ASKS = """
import os, time
def ask(fails_after=None):
    if os.environ["RANK"] == "0":
        return input("name? ")
    if fails_after:
        while not os.path.exists(fails_after):
            time.sleep(0.01)
        raise ValueError("boom")
"""


@pytest.mark.parametrize(
    "waits", ["await launch(ask, num_processes=2)", "notebook_launcher(ask, num_processes=2)"]
)
def test_question_of_a_rank_is_asked_by_the_cell_that_waits(kernel: Kernel, waits: str) -> None:
    cell = kernel.ok(f"{ASKS}\nprint({waits})", answers=["Ada"])
    assert cell.asked == ["[rank 0] name? "]
    assert "[0] 'Ada'" in cell.stdout


@pytest.mark.parametrize(
    "waits",
    ["await launch(ask, asked, num_processes=2)", "notebook_launcher(ask, (asked,), num_processes=2)"],
)
def test_cell_ends_when_a_rank_fails_while_another_one_asks(
    kernel: Kernel, tmp_path: Path, waits: str
) -> None:
    asked = tmp_path / "asked"
    cell = kernel.start(f"{ASKS}\nasked = {str(asked)!r}\n{waits}", answers=[])
    kernel.pump(lambda: cell.asked, 30, "the question")
    asked.touch()
    kernel.finish(cell)
    assert cell.asked == ["[rank 0] name? "]
    assert cell.error == "WorkerError", cell.output
    assert "rank 1 of 2 failed: ValueError: boom" in cell.traceback
    assert "rank 0's question is over" in cell.stderr
    assert kernel.ok("input()", answers=["heard"]).result == "'heard'"


def test_interrupt_ends_a_run_that_a_cell_awaits(kernel: Kernel) -> None:
    kernel.ok("def waits():\n    import time\n    print('in it', flush=True)\n    time.sleep(60)")
    cell = kernel.start("run = launch(waits, num_processes=2)\nawait run")
    kernel.pump(lambda: "in it" in cell.stdout, 20)
    kernel.interrupt()
    kernel.finish(cell, 30)
    assert cell.error in ("CancelledError", "KeyboardInterrupt"), cell.output
    wait_run_ended(kernel)
    assert "KeyboardInterrupt" in kernel.ok("print(repr(run.exception(timeout=5)))").stdout


def test_interrupt_ends_a_loop_of_launches_when_the_ranks_have_returned(
    kernel: Kernel, tmp_path: Path
) -> None:
    opening = tmp_path / "opening"
    kernel.ok(f"""
import os, time
class Slow:
    def __init__(self):
        self.made_by = os.getpid()
    def __setstate__(self, state):
        if os.getpid() != state["made_by"]:
            open({str(opening)!r}, "w").close()
            time.sleep(1.5)
""")
    cell = kernel.start("for number in range(3):\n    notebook_launcher(lambda: Slow(), num_processes=1)")
    kernel.pump(opening.exists, 20)
    kernel.interrupt()
    kernel.finish(cell, 30)
    assert cell.error == "KeyboardInterrupt", cell.output
    assert "last_run().result() has its values" in cell.traceback
    assert (
        "0 Slow"
        in kernel.ok("import nbaccel; print(number, type(nbaccel.last_run().result()[0]).__name__)").stdout
    )


def test_lines_of_ipython_work_in_a_function_of_the_notebook(kernel: Kernel) -> None:
    cell = kernel.ok("""
def lists():
    !echo from the shell
    said = !echo caught
    if said[0] != "caught":
        exit("the shell said something else")
    return said[0]
print(notebook_launcher(lists, num_processes=2))
""")
    assert "from the shell" in cell.stdout
    assert "[0-1] 'caught'" in cell.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
def test_interrupts_end_the_cell_cleanly_at_any_moment(kernel: Kernel, seed: int) -> None:
    """Twenty presses each, single and double, from before the launch to after its end, with the panel up."""
    chance, interrupted = random.Random(seed), 0
    kernel.ok(SLEEP + "\nimport signal\nbefore = signal.getsignal(signal.SIGINT)")
    for _ in range(20):
        cell = kernel.start("time.sleep(0.02); notebook_launcher(work, (0.15,), 2, dashboard=True)")
        kernel.settle(chance.uniform(0.02, 0.3))
        kernel.interrupt()
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0.001, 0.15))
            kernel.interrupt()
        kernel.finish(cell, 30)
        assert cell.error in (None, "KeyboardInterrupt"), cell.output
        interrupted += cell.error is not None
        begun = sum("nbaccel-panel" in shown.get("text/html", "") for shown in cell.displays[:1])
        ended = sum("full output: " in shown.get("text/html", "") for shown in cell.displays)
        assert ended == begun, cell.displays
        wait_run_ended(kernel)
    assert interrupted >= 5
    cell = kernel.ok(
        "print(notebook_launcher(lambda: 5, num_processes=2) == [5, 5],"
        " signal.getsignal(signal.SIGINT) == before)"
    )
    assert "True True" in cell.stdout


def test_interrupt_ends_ranks_blocked_in_a_collective(kernel: Kernel) -> None:
    kernel.ok("""
import os
def block():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    print("ready", flush=True)
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3))
    import time; time.sleep(60)
""")
    cell = kernel.start("notebook_launcher(block, num_processes=2)")
    kernel.pump(lambda: "ready" in cell.stdout, 20)
    time.sleep(0.3)
    kernel.interrupt()
    kernel.finish(cell, 30)
    assert cell.error == "KeyboardInterrupt"
    assert "block" in cell.traceback
    wait_run_ended(kernel)


def test_second_press_kills_when_ranks_ignore_the_first(kernel: Kernel) -> None:
    kernel.ok("""
def deaf():
    import signal, time
    signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    while True: time.sleep(1)
""")
    cell = kernel.start("notebook_launcher(deaf, num_processes=2, grace=30)")
    kernel.pump(lambda: "deaf" in cell.stdout, 20)
    kernel.interrupt()
    time.sleep(0.5)
    assert not cell.done
    kernel.interrupt()
    kernel.finish(cell, 20)
    assert cell.error == "KeyboardInterrupt"
    wait_run_ended(kernel)


FAMILY = """
def family(folder):
    import os, subprocess, sys, time, torch, torch.distributed as dist
    from torch.utils.data import DataLoader
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loaders = [iter(DataLoader(Slow(), num_workers=1))]
    if rank == 0 and dist.get_world_size() > 1:
        loaders += [iter(DataLoader(Slow(), num_workers=1, multiprocessing_context="forkserver"))]
    subprocess.Popen(["sleep", "300"])
    subprocess.Popen(["sleep", "301"], start_new_session=True)
    subprocess.Popen(["setsid", "sh", "-c", "setsid sleep 302 & sleep 303"])
    open(os.path.join(folder, str(rank)), "w").close()
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(300)
class Slow:
    def __len__(self): return 8
    def __getitem__(self, i):
        import time
        time.sleep(300)
"""


def test_nothing_is_left_when_the_kernel_is_killed(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    """A run of each start method, with different processes above its ranks, and a rank that is kept for a look."""
    kernel = new_kernel()
    kernel.ok("from nbaccel import launch, notebook_launcher\n" + FAMILY)
    for method, num_ranks in (("fork", 2), ("spawn", 1)):
        folder = tmp_path / method
        folder.mkdir()
        options = f"num_processes={num_ranks}, start_method={method!r}"
        kernel.ok(f"{method} = launch(family, {str(folder)!r}, {options})", 60)
    marks = [tmp_path / "fork" / "0", tmp_path / "fork" / "1", tmp_path / "spawn" / "0"]
    wait_until(lambda: all(mark.exists() for mark in marks), 90, "all ranks at work")
    failed = kernel.run("notebook_launcher(lambda: 1 / 0, num_processes=1)", 60, answers=[])
    assert "rank 0 is kept with its frames" in failed.traceback
    assert len(named(kernel.pid, "nb-rank-0")) == 3
    time.sleep(1.0)
    paths = kernel.ok("print(fork.folder, spawn.folder, sep='\\n')").stdout.split()
    past = [PastRun(Path(path)) for path in paths]
    assert not any(run.done() for run in past)
    below = [process.pid for process in kernel.processes()]
    assert len(below) > 24
    kernel.kill()
    wait_until(lambda: gone(below), 20, "the end of everything below the kernel")
    for run in past:
        assert run.done()
        assert run.state.situation == "failed"
        assert "was killed or restarted" in repr(run.report())


def test_last_run_is_of_another_kernel_before_the_first_and_is_followed(
    kernel: Kernel, other: Kernel
) -> None:
    kernel.ok(SLEEP + "run = launch(work, 60, num_processes=2)")
    cell = other.ok("import nbaccel; nbaccel.last_run().show()")
    other.pump(lambda: "work · 2 ranks" in plain(repr(cell.displays)), 20, "the run of the other kernel")
    kernel.ok("run.kill(); run.exception()")
    assert (
        "True stopped" in other.ok("run = nbaccel.last_run(); print(run.done(), run.state.situation)").stdout
    )


@pytest.mark.parametrize("victim", ["nb-template", "nb-waiting"])
def test_next_launch_works_when_a_waiting_process_was_killed(kernel: Kernel, victim: str) -> None:
    kernel.ok("notebook_launcher(lambda: 1, num_processes=2)", timeout=60)
    pids = wait_until(lambda: named(kernel.pid, victim), 20, victim)
    os.kill(pids[0], signal.SIGKILL)
    cell = kernel.ok("print(notebook_launcher(lambda: 1, num_processes=2) == [1, 1])", timeout=120)
    assert "True" in cell.stdout


@pytest.mark.parametrize("victim", ["nb-guardian", "nb-server", "nb-template", "nb-run"])
def test_error_is_typed_and_nothing_stays_when_a_process_above_the_ranks_was_killed(
    kernel: Kernel, victim: str
) -> None:
    kernel.ok("""
def start_another():
    import subprocess, time
    print("started", subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
    time.sleep(60)
""")
    cell = kernel.start("notebook_launcher(start_another, num_processes=2)")
    kernel.pump(lambda: len(re.findall(r"started \d+\n", cell.stdout)) == 2, 60)
    started = [int(pid) for pid in re.findall(r"started (\d+)", cell.stdout)]
    assert all(psutil.pid_exists(pid) for pid in started)
    ranks = [*named(kernel.pid, "nb-rank-0"), *named(kernel.pid, "nb-rank-1")]
    os.kill(named(kernel.pid, victim)[0], signal.SIGKILL)
    kernel.finish(cell, 40)
    assert cell.error in ("WorkerError", "LaunchError")
    wait_until(lambda: gone(ranks), 20, "the end of the ranks")
    if victim == "nb-guardian":  # whose work it is
        for pid in started:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(started), 20, "the end of what the ranks had started")
    cell = kernel.ok("print(notebook_launcher(lambda: 1, num_processes=2) == [1, 1])", timeout=120)
    assert "True" in cell.stdout


def test_two_kernels_launch_at_once(kernel: Kernel, other: Kernel) -> None:
    kernels = [kernel, other]
    other.ok("from nbaccel import notebook_launcher")
    code = """
def meet(me):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    x = torch.tensor([me]); dist.all_reduce(x)
    return int(x)
print([notebook_launcher(meet, ({me},), num_processes=2) == [2 * {me}] * 2 for _ in range(3)])
"""
    cells = [started.start(code.replace("{me}", str(me))) for me, started in enumerate(kernels, 1)]
    for started, cell in zip(kernels, cells, strict=True):
        started.finish(cell, 120)
        assert "[True, True, True]" in cell.stdout, cell.output


def test_running_run_goes_on_when_another_launch_needs_a_fresh_server(kernel: Kernel, tmp_path: Path) -> None:
    """The launch that needs it is interrupted while that server is cold, and works when it is made again."""
    kernel.ok(f"""
import os, time
def wait():
    while not os.path.exists({str(tmp_path / "over")!r}):
        time.sleep(0.01)
first = launch(wait, num_processes=1)
""")
    kernel.ok(SLEEP)
    cell = kernel.start('os.environ["OMP_NUM_THREADS"] = "3"; notebook_launcher(work, num_processes=2)')
    kernel.pump(lambda: "OMP_NUM_THREADS changed" in cell.stderr, 60)
    time.sleep(0.2)
    kernel.interrupt()
    kernel.finish(cell, 20)
    assert cell.error == "KeyboardInterrupt", cell.output
    cell = kernel.ok(
        'print(notebook_launcher(lambda: os.environ["OMP_NUM_THREADS"], num_processes=1))', timeout=120
    )
    assert "3" in cell.stdout
    assert kernel.ok("first.done()").result == "False"
    (tmp_path / "over").touch()
    cell = kernel.ok('del os.environ["OMP_NUM_THREADS"]; print(first.result())', timeout=60)
    assert "None" in cell.stdout
    kernel.ok("notebook_launcher(int, num_processes=1)", timeout=120)

    def one_server() -> bool:
        kernel.ok("pass")  # between cells the kernel looks after its servers
        return len(psutil.Process(kernel.pid).children()) <= 1

    wait_until(one_server, 20, "the end of the old servers")
