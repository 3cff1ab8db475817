"""How fast stacks come from ranks, and how fast a hang is named.

    PYTHONPATH=. python benchmarks/hangs.py

Eight ranks wait in a barrier for one that sleeps, or that computes in C code with the interpreter's lock
held (then faulthandler has to tell). A hang is timed from the line before the missing call to the report.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable

from nbaccel import Run, launch

RANKS, ROUNDS, STALL_AFTER = 8, 20, 3.0


def sleep() -> None:
    time.sleep(60)


def hold_the_lock() -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")


def wait_for(stuck: Callable[[], None]) -> None:
    """What the ranks run: rank 5 does not come to the second barrier."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "5":
        print(f"stuck at {time.time()}", flush=True)
        stuck()
    dist.barrier()


def _start(stuck: Callable[[], None]) -> tuple[Run, float]:
    """A run that hangs, and since when (seconds since the epoch)."""
    run = launch(wait_for, stuck, num_processes=RANKS, stall_after=STALL_AFTER, output="none", folder=False)
    end = time.monotonic() + 60
    while not (found := re.search(r"stuck at ([\d.]+)", run.logs(5))):
        assert time.monotonic() < end, f"not stuck in 60 s:\n{run.logs(5)}"
        time.sleep(0.01)
    return run, float(found[1])


def _end(run: Run) -> None:
    run.kill()
    try:
        run.result(timeout=30)
    except KeyboardInterrupt:
        pass  # as asked


def _stacks(stuck: Callable[[], None]) -> list[float]:
    """Seconds of `run.stacks()`, each checked to name rank 5."""
    run, _ = _start(stuck)
    time.sleep(1.5)
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        report = run.stacks()
        taken.append(time.perf_counter() - start)
        assert "rank 5" in report.headlines()[0], report
    _end(run)
    return taken


def _named(stuck: Callable[[], None]) -> float:
    """Seconds from the start of the hang to the report."""
    run, since = _start(stuck)
    while run.stall is None or run.stall.report is None:
        assert time.time() - since < STALL_AFTER + 30, run.stacks()
        time.sleep(0.01)
    after = time.time() - since
    assert "rank 5" in run.stall.text
    _end(run)
    return after


def main() -> None:
    launch(int, num_processes=RANKS, folder=False).result()  # the server is warm
    print(
        f"| {RANKS} ranks | stacks, median | stacks, longest | hang named after stall_after={STALL_AFTER:g} s + |"
    )
    print("|---|---:|---:|---:|")
    for name, stuck in (("one sleeps", sleep), ("one holds the interpreter's lock", hold_the_lock)):
        taken, named = _stacks(stuck), _named(stuck)
        print(
            f"| {name} | {statistics.median(taken):.3f} s | {max(taken):.3f} s | {named - STALL_AFTER:.2f} s |"
        )


if __name__ == "__main__":
    main()
