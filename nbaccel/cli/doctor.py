"""`nbaccel doctor`: what on this machine breaks launches; ends ranks of dead kernels when asked."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile

import click

from nbaccel.session import doctor as checks
from nbaccel.session.accelerators import gpu_memory_by_process
from nbaccel.session.doctor import Check, Report
from nbaccel.session.environment import probe
from nbaccel.session.runs import default_root

__all__ = ["doctor"]


@click.command()
@click.option("--end-leftovers", is_flag=True, help="End the ranks of dead kernels that it names.")
def doctor(end_leftovers: bool) -> int:
    """Look at this machine; changes nothing unless told. Exit code 1 when something needs doing."""
    environment = probe()
    torch = importlib.import_module("torch")  # what it was built for, and what it loads, is looked at
    leftovers = checks.find_leftovers() if sys.platform == "linux" else ()
    accelerators = environment.accelerators
    cuda = getattr(torch.version, "cuda", None)
    report = Report(
        checks=(
            checks.check_accelerators(accelerators, cuda, None),
            checks.check_nccl(os.environ, checks.mapped_files()),
            checks.check_tpu_variables(os.environ, accelerators.tpu_chips),
            checks.check_leftovers(leftovers, gpu_memory_by_process() if leftovers else {}),
            checks.shared_memory_here(),
            checks.check_packages(dict(sys.modules)),
            _run_folders(),
        ),
        leftovers=leftovers,
    )
    click.echo(repr(report))
    if end_leftovers:
        click.echo(f"ended {report.end_leftovers()} process(es)")
        return 0
    return 1 if report.problems else 0


def _run_folders() -> Check:
    """Whether runs can be kept."""
    root = default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        return Check(
            name="run folders",
            status="problem",
            text=f"{root} cannot be written: {error.strerror}",
            advice="runs are then kept nowhere; set XDG_STATE_HOME, or give --folder",
        )
    return Check(name="run folders", status="ok", text=f"{root} can be written")
