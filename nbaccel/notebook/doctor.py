"""`nbaccel.doctor()`: what breaks launches from this notebook, and what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from nbaccel.notebook import kernel
from nbaccel.notebook.session import idle_sessions
from nbaccel.rank.process import device_files
from nbaccel.session import doctor as checks
from nbaccel.session.accelerators import gpu_memory_by_process
from nbaccel.session.doctor import Check, Report
from nbaccel.session.environment import probe

__all__ = ["doctor"]


def doctor(function: Callable[..., Any] | None = None) -> Report:
    """Look at this kernel and this machine; changes nothing. Takes about a tenth of a second.

    Args:
        function: also check that it, with the globals it uses, can be sent to ranks.

    Returns: a report that shows itself; `problems` are what needs something done, and `end_leftovers()`
    ends ranks of kernels that are gone, exactly those it names.
    """
    environment = probe()
    leftovers = checks.find_leftovers() if sys.platform == "linux" else ()
    found = [
        _cuda_here(),
        checks.check_accelerators(environment.accelerators, _torch_cuda(), _driver_cuda()),
        checks.check_nccl(os.environ, checks.mapped_files()),
        checks.check_tpu_variables(os.environ, environment.accelerators.tpu_chips),
        checks.check_leftovers(leftovers, gpu_memory_by_process() if leftovers else {}),
        checks.check_sessions(idle_sessions()),
        checks.shared_memory_here(),
        checks.check_front_end(environment.kernel),
        checks.check_packages(dict(sys.modules)),
    ]
    if function is not None:
        found.append(checks.check_function(function))
    return Report(checks=tuple(found), leftovers=leftovers)


def _cuda_here() -> Check:
    """Who initialised an accelerator in this process."""
    name = "this kernel"
    culprit = kernel.culprit()
    if culprit is None and not device_files():
        return Check(name=name, status="ok", text="has opened no accelerator")
    who = f"by {culprit}" if culprit else "before nbaccel was imported"
    return Check(
        name=name,
        status="note",
        text=f"an accelerator was opened here, {who}",
        advice="launches work all the same; the context holds memory of the device until the kernel restarts",
    )


def _torch_cuda() -> str | None:
    version = getattr(sys.modules.get("torch"), "version", None)
    found = getattr(version, "cuda", None)
    return str(found) if found else None


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA the NVIDIA driver knows, by NVML; opens no context."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        version = int(pynvml.nvmlSystemGetCudaDriverVersion())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version // 1000, version % 1000 // 10
