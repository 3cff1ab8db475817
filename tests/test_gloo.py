"""Ending process groups: torch's own way to free one can wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nbaccel import notebook_launcher


def open_and_close(times: int) -> int:
    """DDP steps, each in its own group, the model freed right after the group: the deadlock's place."""
    for _ in range(times):
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        dist.barrier()
        dist.destroy_process_group()
        del model
    return times


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("times", [15, pytest.param(40, marks=pytest.mark.long)])
def test_groups_with_a_ddp_model_are_closed_time_and_again(times: int) -> None:
    # without keeping the groups a rank hung here in one of some fifty rounds
    assert notebook_launcher(open_and_close, (times,), num_processes=4, max_time=150) == [times] * 4


def live_groups(times: int) -> list[int]:
    """Threads of the process after each round of opening and closing a group, with time between."""
    import os
    import time

    counts = []
    for _ in range(times):
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(1.0)
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.usefixtures("clean")
def test_closed_groups_do_not_pile_up() -> None:
    counts = notebook_launcher(live_groups, (6,), num_processes=2)[0]
    assert counts[-1] <= counts[2]


SCRIPT = """
import os, socket, sys
import torch
import torch.distributed as dist
from nbaccel import Accelerator

SIZE = 8
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
ranks = []
for rank in range(SIZE):
    if (pid := os.fork()) == 0:
        break
    ranks.append(pid)
else:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    sys.exit(f"the ranks left with {codes}" if any(codes) else 0)
os.environ.update(
    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_WORLD_SIZE=str(SIZE),
    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
)
acc = Accelerator()
for _ in range(20):
    acc.gather(torch.ones(100))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_scripts_that_no_launch_of_ours_started_end_without_an_abort_when_the_machine_is_busy(
    tmp_path: Path,
) -> None:
    # without waiting for the workers about one rank in thirty aborted. All are forked from a process that has imported
    # torch: how a rank's interpreter shuts down is the same
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NBACCEL_RUN_CONFIG": '{"device": "cpu"}'}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
