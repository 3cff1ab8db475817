"""What the doctor sees, and that it ends exactly what it names."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import nbaccel
from nbaccel.session import doctor
from nbaccel.session.accelerators import Accelerators, Gpu
from nbaccel.session.doctor import Idle, Leftover, Report

LEFT = """
import sys, time
from nbaccel.rank.process import call_process
call_process(sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def named_process() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that call themselves "nb-rank-7" and have no kernel above them, and one ordinary one."""
    processes = [
        subprocess.Popen([sys.executable, "-c", LEFT, name], stdout=subprocess.PIPE, text=True)
        for name in ("nb-rank-7", "python")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_rank_without_a_kernel_is_found_and_only_it_is_ended(
    named_process: list[subprocess.Popen[str]],
) -> None:
    left, other = named_process
    mine = tuple(one for one in doctor.find_leftovers() if one.pid in (left.pid, other.pid))
    assert [(one.pid, one.name) for one in mine] == [(left.pid, "nb-rank-7")]
    wrong = Leftover(other.pid, "nb-rank-8", started=mine[0].started - 1)
    assert Report(checks=(), leftovers=(*mine, wrong)).end_leftovers() == 1
    assert left.wait(timeout=5) == -9
    assert other.poll() is None


def test_ranks_of_a_living_process_are_no_leftovers(clean: None) -> None:
    def look() -> int:
        return len([one for one in doctor.find_leftovers() if one.pid in above_me()])

    assert nbaccel.notebook_launcher(look, num_processes=2) == [0, 0]


def test_gpu_memory_of_leftovers_is_told_and_the_largest_comes_first() -> None:
    left = (Leftover(5, "nb-rank-0", 1), Leftover(6, "nb-rank-1", 1))
    assert doctor.check_leftovers(left, {}).text.endswith("nb-rank-0 (pid 5), nb-rank-1 (pid 6)")
    found = doctor.check_leftovers(left, {6: 512_000_000, 7: 1})
    assert found.text.endswith("nb-rank-1 (pid 6, 512 MB of a GPU), nb-rank-0 (pid 5)")


def test_a_session_that_holds_a_device_and_does_nothing_is_named(warm: None) -> None:
    forgotten = Idle(name="mine", device="cuda", seconds=3000)
    assert doctor.check_sessions([forgotten]).status == "note"
    assert "'mine' on cuda, idle for 50 min" in doctor.check_sessions([forgotten]).text
    assert doctor.check_sessions([replace(forgotten, device="cpu")]).status == "ok"
    assert doctor.check_sessions([replace(forgotten, seconds=60)]).status == "ok"
    with nbaccel.Session(1, device="cpu", name="seen") as session:
        session.run(int)
        assert "'seen' on cpu" in repr(nbaccel.doctor())
        run = session.submit(time.sleep, 0.5)
        assert "'seen'" not in repr(nbaccel.doctor())
        run.result()
    assert "'seen'" not in repr(nbaccel.doctor())


def above_me() -> set[int]:
    import psutil

    return {psutil.Process().pid, *(process.pid for process in psutil.Process().parents())}


def test_a_cpu_build_beside_gpus_is_a_problem() -> None:
    found = Accelerators(gpus=(Gpu(index=0),), torch_build="cpu", torch_version="2.9")
    assert "CPU build" in doctor.check_accelerators(found, None, None).text


def test_a_torch_newer_than_the_driver_is_a_problem() -> None:
    found = Accelerators(gpus=(Gpu(index=0),), torch_build="cuda", torch_version="2.9")
    assert doctor.check_accelerators(found, "13.0", (12, 4)).status == "problem"
    assert doctor.check_accelerators(found, "12.8", (12, 4)).status == "ok"


def test_a_stray_nccl_is_named(tmp_path: Path) -> None:
    assert doctor.check_nccl({"LD_LIBRARY_PATH": str(tmp_path)}, "").status == "ok"
    (tmp_path / "libnccl.so.2").touch()
    assert str(tmp_path) in doctor.check_nccl({"LD_LIBRARY_PATH": str(tmp_path)}, "").text
    two = "7f0 r /usr/lib/libnccl.so.2\n7f1 r /venv/nvidia/nccl/lib/libnccl.so.2\n"
    assert doctor.check_nccl({}, two).status == "problem"


def test_tpu_variables_without_a_tpu_are_a_problem() -> None:
    found = doctor.check_tpu_variables({"PJRT_DEVICE": "TPU", "CLOUD_TPU_TASK_ID": "0"}, 0)
    assert found.status == "problem"
    assert "del os.environ['CLOUD_TPU_TASK_ID']; del os.environ['PJRT_DEVICE']" in found.advice
    assert doctor.check_tpu_variables({"PJRT_DEVICE": "TPU"}, 4).status == "ok"


def test_a_package_installed_again_is_named() -> None:
    module = types.ModuleType("psutil")
    module.__file__ = "/venv/lib/python3/site-packages/psutil/__init__.py"
    module.__version__ = "0.0.1"  # type: ignore[attr-defined]
    found = doctor.check_packages({"psutil": module})
    assert found.status == "problem"
    assert "psutil (0.0.1 in this kernel," in found.text


def test_a_function_with_a_lock_is_named() -> None:
    lock = threading.Lock()

    def train() -> None:
        with lock:
            pass

    found = nbaccel.doctor(train)
    assert [check.name for check in found.problems if check.name.startswith("function")] == ["function train"]
    assert "lock" in repr(found)


def test_segments_of_dead_processes_are_named(tmp_path: Path) -> None:
    with (tmp_path / "torch_4194305_1").open("wb") as file:  # above the largest process id
        file.truncate(200 << 20)
    found = doctor.check_shared_memory(8 << 30, 8 << 30, tmp_path)
    assert found.status == "problem"
    assert found.advice == f"rm {tmp_path}/torch_4194305_1"
    assert doctor.check_shared_memory(100 << 20, 1 << 30, tmp_path / "none").status == "note"
