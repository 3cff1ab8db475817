"""Distributed PyTorch from a notebook cell."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0.dev0"

# The public names and where they live; nothing is imported before it is used.
_HOMES = {
    "Accelerator": "nbaccel.core.accelerator",
    "ContextParallel": "nbaccel.parallel",
    "DDPOptions": "nbaccel.core.strategies.ddp",
    "DeepSpeed": "nbaccel.parallel",
    "FP8Options": "nbaccel.fp8",
    "FSDP": "nbaccel.parallel",
    "LocalSGD": "nbaccel.core.local_sgd",
    "Megatron": "nbaccel.parallel",
    "Pipeline": "nbaccel.parallel",
    "Run": "nbaccel.session.run",
    "RunConfig": "nbaccel.config",
    "ScalerOptions": "nbaccel.core.precision",
    "TensorParallel": "nbaccel.parallel",
    "Session": "nbaccel.notebook.session",
    "compare": "nbaccel.session.comparing",
    "cpu_offload": "nbaccel.core.offload",
    "disk_offload": "nbaccel.core.offload",
    "dispatch_model": "nbaccel.core.offload",
    "doctor": "nbaccel.notebook.doctor",
    "find_executable_batch_size": "nbaccel.core.memory",
    "find_tied_parameters": "nbaccel.core.model.tied",
    "get_logger": "nbaccel.core.logger",
    "infer_auto_device_map": "nbaccel.core.offload",
    "init_empty_weights": "nbaccel.core.offload",
    "init_on_device": "nbaccel.core.offload",
    "last_run": "nbaccel.notebook.launcher",
    "load_checkpoint_and_dispatch": "nbaccel.core.offload",
    "launch": "nbaccel.notebook.launcher",
    "map": "nbaccel.notebook.sweep",
    "notebook_launcher": "nbaccel.notebook.launcher",
    "plan": "nbaccel.session.planning",
    "remove_hooks": "nbaccel.core.offload",
    "retie_parameters": "nbaccel.core.model.tied",
    "runs": "nbaccel.notebook.past",
    "set_seed": "nbaccel.core.rng",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nbaccel' has no attribute {name!r}")


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext nbaccel`: the magics `%nbaccel` and `%%ranks`."""
    importlib.import_module("nbaccel.notebook.extension").load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext nbaccel`: end the session and forget the magics."""
    importlib.import_module("nbaccel.notebook.extension").unload(shell)


if "ipykernel" in sys.modules:
    importlib.import_module("nbaccel.notebook.kernel").prepare()
