"""What is promised where the operating system is not Linux; here, with what is Linux's own taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, gone, wait_until

# read by every interpreter that is started: that of the script, the guardian and the ranks
WITHOUT_LINUX = """
import fcntl, os, select, signal, socket

for module, names in {
    os: "waitid memfd_create pidfd_open sched_getaffinity",
    socket: "MSG_CMSG_CLOEXEC",
    fcntl: "F_SETPIPE_SZ F_ADD_SEALS",
    signal: "SIGRTMIN SIGRTMAX",
    select: "epoll",
}.items():
    for name in names.split():
        delattr(module, name)


listdir = os.listdir


def without_proc(path="."):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return listdir(path)


os.listdir = without_proc

import nbaccel.rank.process

nbaccel.rank.process._libc = None
"""
SCRIPT = """
import os, subprocess, time
from nbaccel import notebook_launcher


def meet():
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    print("sum", int(total), os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
    while True:
        sum(range(1000))


if __name__ == "__main__":
    notebook_launcher(meet, num_processes=2, start_method="spawn", output="all")
"""


def test_spawned_ranks_meet_and_none_outlives_who_launched_them(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LINUX)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(tmp_path), ROOT])
    environ = {**os.environ, "PYTHONPATH": paths, "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        lines = [line for line in (process.stdout.readline() for _ in range(2)) if "sum 2" in line]
        process.kill()
    pids = [int(word) for line in lines for word in line.split()[-2:]]
    assert len(pids) == 4, lines
    wait_until(lambda: gone(pids), 10, "the ranks' end, and that of what they started")


def test_windows_is_refused_in_words() -> None:
    ready = "import sys, sysconfig; sysconfig.get_paths()"  # it looks for a file named after the platform
    code = f"{ready}; sys.platform = 'win32'; from nbaccel import notebook_launcher"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ImportError: nbaccel starts its ranks with" in done.stderr
    assert "WSL 2" in done.stderr
