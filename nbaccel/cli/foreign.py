"""Hugging Face Accelerate's configuration file in our keys (its names and values: accelerate 1.15)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.configfile import ConfigFile

__all__ = ["Imported", "from_accelerate", "their_default"]

_DEVICES = {"MULTI_GPU": "cuda", "MULTI_CPU": "cpu", "MULTI_XPU": "xpu", "NO": None}
_STRATEGIES = {
    "FSDP": ("fsdp_config", "FSDP2"),
    "DEEPSPEED": ("deepspeed_config", "DeepSpeed"),
    "MEGATRON_LM": ("megatron_lm_config", "Megatron-LM"),
    "XLA": ("tpu_name", "TPU"),
}
# Where each value stands for "not used", or changes nothing here.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "debug": (False,),
    "downcast_bf16": ("no", False, "false"),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    "tpu_env": ([], None),
    "enable_cpu_affinity": (False,),
    "fsdp_config": ({}, None),
    "deepspeed_config": ({}, None),
    "megatron_lm_config": ({}, None),
    "parallelism_config": ({}, None),
    "fp8_config": ({}, None),
    "ipex_config": ({}, None),
    "mpirun_config": ({}, None),
    "dynamo_config": ({}, None),
    "dynamo_backend": ("NO", "no"),
    "num_machines": (1,),
    "machine_rank": (0,),
}
_HERE_OTHERWISE = {
    "rdzv_backend": "the ranks of one machine meet by themselves; several machines: nbaccel launch --nnodes",
    "same_network": "several machines: nbaccel launch --nnodes --rdzv-endpoint",
    "main_process_ip": "several machines: nbaccel launch --nnodes --rdzv-endpoint",
    "main_process_port": "a free port is taken at every launch",
    "num_machines": "several machines: nbaccel launch --nnodes --rdzv-endpoint",
    "machine_rank": "the machines agree on their ranks",
    "main_training_function": "the script is run as it is",
    "num_cpu_threads_per_process": "cores are divided fairly; OMP_NUM_THREADS overrides",
    "enable_cpu_affinity": "not built",
}
_SILENT = {
    "rdzv_backend": ("static", "c10d", None),
    "same_network": (True, False),
    "main_training_function": ("main",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was taken over, and what was not."""

    config: RunConfig
    notes: tuple[str, ...]


def their_default() -> Path:
    """Where accelerate keeps its default file.

    Raises:
        ConfigError: there is none.
    """
    home = Path(os.path.expanduser("~")) / ".cache" / "huggingface" / "accelerate"
    for name in ("default_config.yaml", "default_config.yml"):
        if (home / name).is_file():
            return home / name
    raise ConfigError(f"accelerate has no default file in {home}; name one: nbaccel config import FILE")


def from_accelerate(file: ConfigFile) -> Imported:
    """Our configuration for one of theirs.

    Raises:
        ConfigError: it asks for a strategy that is not built, or is no file of accelerate's.
    """
    values = dict(file.values)
    kind = str(values.pop("distributed_type", "NO"))
    if "compute_environment" not in values and "num_processes" not in values:
        raise ConfigError(
            f"{file.path} is no configuration file of accelerate's: it has no compute_environment"
        )
    _refuse(file, kind, values)
    asked: dict[str, Any] = {}
    if kind not in _DEVICES:
        raise ConfigError(
            f"distributed_type (from {file.place('distributed_type')}) is {kind!r}, which is not known"
        )
    if values.pop("use_cpu", False) or kind == "MULTI_CPU":
        asked["device"] = "cpu"
    elif _DEVICES[kind]:
        asked["device"] = _DEVICES[kind]
    for key in ("num_processes", "mixed_precision", "gradient_accumulation_steps", "gradient_clipping"):
        value = values.pop(key, None)
        if value is not None and value != "auto":
            asked[key] = value
    _read_devices(values, asked)
    notes = _read_compile(values, asked)
    for key, value in values.items():
        if value in _HARMLESS.get(key, ()) or value in _SILENT.get(key, ()):
            continue
        why = _HERE_OTHERWISE.get(key, "there is nothing like it here")
        notes.append(f"{key}: {value!r} ({file.place(key)}): {why}")
    place = str(file.path.name)
    return Imported(config=RunConfig.from_mapping(asked, place=place), notes=tuple(notes))


def _refuse(file: ConfigFile, kind: str, values: Mapping[str, Any]) -> None:
    if kind in _STRATEGIES:
        key, name = _STRATEGIES[kind]
        raise ConfigError(
            f"distributed_type (from {file.place('distributed_type')}) is {kind}: {name} is not built yet, so "
            f"{key} cannot be taken over. Use MULTI_GPU, which is our strategy 'ddp'."
        )
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise ConfigError(
            f"compute_environment (from {file.place('compute_environment')}) is "
            f"{values['compute_environment']!r}: only LOCAL_MACHINE can be taken over"
        )


def _read_devices(values: dict[str, Any], asked: dict[str, Any]) -> None:
    listed = values.pop("gpu_ids", "all")
    if listed in (None, "all", "") or asked.get("device") == "cpu":
        return
    asked["devices"] = [int(part) for part in str(listed).split(",")]


def _read_compile(values: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    dynamo = values.pop("dynamo_config", None) or {}
    backend = str(dynamo.get("dynamo_backend", "no")).lower()
    if backend in ("no", "none"):
        return []
    if backend != "inductor":
        return [f"dynamo_backend: {backend!r}: only inductor is compiled with here"]
    mode = dynamo.get("dynamo_mode", "default")
    asked["compile"] = True if mode in (None, "default") else mode
    extra = [key for key in dynamo if key not in ("dynamo_backend", "dynamo_mode") and dynamo[key]]
    return [f"dynamo_config.{key}: {dynamo[key]!r}: there is nothing like it here" for key in extra]
