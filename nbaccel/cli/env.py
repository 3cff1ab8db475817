"""`nbaccel env`: what a bug report needs to know of this machine, and no secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from nbaccel.config import RunConfig
from nbaccel.errors import NbaccelError
from nbaccel.session import configfile
from nbaccel.session.environment import Environment, probe
from nbaccel.session.resolve import resolve

__all__ = ["env"]

_PACKAGES = (
    "nbaccel",
    "torch",
    "numpy",
    "cloudpickle",
    "ipython",
    "ipykernel",
    "ipywidgets",
    "transformers",
    "accelerate",
    "lightning-fabric",
    "deepspeed",
    "safetensors",
    "torchao",
    "ray",
)
_FRONT_ENDS = ("jupyterlab", "notebook", "nbclient", "papermill", "jupyter-client", "voila")
# By name, for the environment holds credentials too; none of these can.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "TORCHDYNAMO_DISABLE",
    "TORCH_DISTRIBUTED_DEBUG",
    "WORLD_SIZE",
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def env(as_json: bool) -> None:
    """Print versions, devices, kernels and front ends, to be pasted into a bug report.

    No secrets: only variables known to hold none, no host name, and ~ for the home folder.
    """
    facts = _facts(probe())
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_text(value)}")


def _facts(environment: Environment) -> dict[str, Any]:
    accelerators, resources = environment.accelerators, environment.resources
    return {
        "nbaccel": _version("nbaccel") or "not installed, run from its folder",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": f"{accelerators.torch_version or 'not installed'} (built for {accelerators.torch_build})",
        "devices": _devices(environment),
        "cores": resources.cores,
        "memory": _size(resources.memory),
        "shared memory": _shared_memory(),
        "a launch here": _launch(environment),
        "configuration": _configuration(),
        "platform": environment.platform,
        "jupyter kernels": _kernels(),
        "front ends": _versions(_FRONT_ENDS),
        "packages": _versions(_PACKAGES),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _devices(environment: Environment) -> list[str]:
    found = environment.accelerators
    listed = [
        f"GPU {index}: {gpu.name}"
        + (f", compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu.capability else "")
        for index, gpu in enumerate(found.gpus)
    ]
    listed += [f"{found.xpus} XPU"] if found.xpus else []
    listed += ["MPS"] if found.mps else []
    listed += [f"{found.tpu_chips} TPU chips"] if found.tpu_chips else []
    return listed or ["CPU only"]


def _launch(environment: Environment) -> str:
    try:
        plan = resolve(RunConfig(), environment)
    except NbaccelError as error:
        return f"refused: {error}"
    return f"{plan.num_processes} rank(s) on {plan.device}, {plan.threads} thread(s) each, {plan.backend}"


def _configuration() -> str:
    try:
        path = configfile.find_file()
        if path is None:
            return "none"
        asked = json.loads(configfile.read_file(path).config().to_json())
    except NbaccelError as error:
        return _homeless(str(error))
    asked.pop("sources", None)
    asked.pop("project_dir", None)
    return f"{_homeless(str(path))}: {asked}"


def _kernels() -> list[str]:
    """Jupyter kernels by name, and whether each is this very Python."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager
    except ImportError:
        return []
    found = KernelSpecManager().get_all_specs()
    return [
        f"{name} ({'this Python' if _is_own(one['spec'].get('argv', [''])) else _homeless(one['spec']['argv'][0])})"
        for name, one in sorted(found.items())
    ]


def _is_own(argv: list[str]) -> bool:
    return bool(argv) and (argv[0] in ("python", "python3") or Path(argv[0]) == Path(sys.executable))


def _shared_memory() -> str:
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return "unknown"
    return f"{_size(found.f_bavail * found.f_frsize)} free of {_size(found.f_blocks * found.f_frsize)}"


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: found for name in names if (found := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "nbaccel":
            from nbaccel import __version__

            return __version__
        return None


def _homeless(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "none"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
