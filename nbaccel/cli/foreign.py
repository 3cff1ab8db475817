"""Hugging Face Accelerate's configuration file in our keys (its names and values: accelerate 1.15)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.parallel import SHARDING_OF_ACCELERATE
from nbaccel.session.configfile import ConfigFile

__all__ = ["Imported", "from_accelerate", "their_default"]

_DEVICES = {
    "NO": None,
    "MULTI_GPU": "cuda",
    "MULTI_CPU": "cpu",
    "MULTI_XPU": "xpu",
    "XLA": "tpu",
    # on the accelerators that are there
    "FSDP": None,
    "DEEPSPEED": None,
    "MEGATRON_LM": None,
}
_FP8_BACKENDS = {"ao": "torchao", "torchao": "torchao", "te": "transformer_engine"}
# What the strategies do here in any case, or by themselves.
_ANYWAY = {
    "fsdp_version",
    "fsdp_backward_prefetch",
    "fsdp_cpu_ram_efficient_loading",
    "fsdp_state_dict_type",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_multinode_launcher",
}
# Where each value stands for "not used", or changes nothing here.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "debug": (False,),
    "downcast_bf16": ("no", False, "false"),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    "tpu_env": ([],),
    "enable_cpu_affinity": (False,),
    "fsdp_config": ({},),
    "deepspeed_config": ({},),
    "megatron_lm_config": ({},),
    "parallelism_config": ({},),
    "fp8_config": ({},),
    "ipex_config": ({},),
    "mpirun_config": ({},),
    "dynamo_config": ({},),
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
    "parallelism_config": "strategy fsdp, with tensor_parallel and context_parallel",
    "tpu_name": "nbaccel launch runs on the TPU of this host",
    "tpu_zone": "nbaccel launch runs on the TPU of this host",
}
_SILENT = {
    "rdzv_backend": ("static", "c10d"),
    "same_network": (True, False),
    "main_training_function": ("main",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was taken over, and what was not."""

    config: RunConfig
    notes: tuple[str, ...]
    """Sentences for the person."""


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
        ConfigError: it asks for what cannot be taken over, or is no file of accelerate's.
    """
    values = {key: value for key, value in file.values.items() if value is not None}
    kind = str(values.pop("distributed_type", "NO"))
    if "compute_environment" not in values and "num_processes" not in values:
        raise ConfigError(
            f"{file.path} is no configuration file of accelerate's: it has no compute_environment"
        )
    _refuse(file, kind, values)
    notes: list[str] = []
    asked: dict[str, Any] = {}
    if values.pop("use_cpu", False) or kind == "MULTI_CPU":
        asked["device"] = "cpu"
    elif _DEVICES[kind]:
        asked["device"] = _DEVICES[kind]
    _read_number(file, values, asked, notes)
    for key in ("mixed_precision", "gradient_accumulation_steps", "gradient_clipping"):
        value = values.pop(key, "auto")
        if value != "auto":
            asked[key] = value
    _read_devices(file, values, asked)
    for key, (wanted, read) in _SECTIONS.items():
        if wanted == kind or (wanted is None and key in values):
            section = _section(file, values, key)
            read(section, asked)
            notes += [
                f"left out: {key}.{name}: {value!r} ({file.place(key)}): there is nothing like it here"
                for name, value in section.items()
                if name not in _ANYWAY
            ]
    for key, value in values.items():
        if value in _HARMLESS.get(key, ()) or value in _SILENT.get(key, ()):
            continue
        why = _HERE_OTHERWISE.get(key, "there is nothing like it here")
        notes.append(f"left out: {key}: {value!r} ({file.place(key)}): {why}")
    place = str(file.path.name)
    return Imported(config=RunConfig.from_mapping(asked, place=place), notes=tuple(notes))


def _refuse(file: ConfigFile, kind: str, values: Mapping[str, Any]) -> None:
    if kind not in _DEVICES:
        raise ConfigError(
            f"distributed_type (from {file.place('distributed_type')}) is {kind!r}, which is not known"
        )
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise ConfigError(
            f"compute_environment (from {file.place('compute_environment')}) is "
            f"{values['compute_environment']!r}: only LOCAL_MACHINE can be taken over"
        )


def _section(file: ConfigFile, values: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under a key and says something."""
    found = values.pop(key, {})
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{key} (from {file.place(key)}) is {found!r}; accelerate writes keys and values there"
        )
    return {str(name): value for name, value in found.items() if value is not None}


def _read_number(file: ConfigFile, values: dict[str, Any], asked: dict[str, Any], notes: list[str]) -> None:
    """Theirs is of all machines together, ours of each."""
    number, machines = values.pop("num_processes", None), values.get("num_machines", 1)
    if number is None:
        return
    several = isinstance(number, int) and isinstance(machines, int) and machines > 1
    place = file.place("num_processes")
    if asked.get("device") == "tpu":
        notes.append(
            f"left out: num_processes: {number} ({place}): a TPU's runtime takes all chips of the host"
        )
    elif several and number % machines:
        notes.append(
            f"left out: num_processes: {number} ({place}): it is of {machines} machines together; give each its own, "
            "with nbaccel launch -n"
        )
    elif several:
        asked["num_processes"] = each = number // machines
        notes.append(f"num_processes: {number} of {machines} machines together ({place}) are {each} on each")
    else:
        asked["num_processes"] = number


def _read_devices(file: ConfigFile, values: dict[str, Any], asked: dict[str, Any]) -> None:
    listed = values.pop("gpu_ids", "all")
    if listed in ("all", "") or asked.get("device") == "cpu":
        return
    parts = [part.strip() for part in str(listed).split(",")]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(
            f"gpu_ids (from {file.place('gpu_ids')}) is {listed!r}; it must be all, or numbers with commas between them"
        )
    asked["devices"] = [int(part) for part in parts]


# Each takes out of a section what it has understood.


def _read_fsdp(given: dict[str, Any], asked: dict[str, Any]) -> None:
    options: dict[str, Any] = {}
    for key in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
        value = given.get(key)
        if isinstance(value, bool):
            options["reshard_after_forward"] = given.pop(key)
        elif str(value).upper() in SHARDING_OF_ACCELERATE:
            options["sharding"] = SHARDING_OF_ACCELERATE[str(given.pop(key)).upper()]
    policy = str(given.pop("fsdp_auto_wrap_policy", "")).upper()
    names = given.pop("fsdp_transformer_layer_cls_to_wrap", "")
    least = given.pop("fsdp_min_num_params", 0)
    if policy == "NO_WRAP":
        options["wrap"] = "none"
    elif policy == "SIZE_BASED_WRAP":
        options["wrap"] = int(least) or 100_000_000
    elif names:
        options["wrap"] = [name.strip() for name in str(names).split(",")]
    if given.pop("fsdp_offload_params", False):
        options["cpu_offload"] = True
    if given.pop("fsdp_activation_checkpointing", False):
        options["activation_checkpointing"] = True
    if given.pop("fsdp_forward_prefetch", False):
        options["forward_prefetch"] = 1
    _ask("fsdp", options, asked)


def _read_deepspeed(given: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        value = given.pop(key, "auto")
        if value != "auto":
            asked[key] = value
    options: dict[str, Any] = {}
    for key, ours in (("zero_stage", "stage"), ("deepspeed_config_file", "config")):
        if key in given:
            options[ours] = given.pop(key)
    for what in ("optimizer", "param"):
        place = str(given.pop(f"offload_{what}_device", "none")).lower()
        folder = given.pop(f"offload_{what}_nvme_path", None)
        if place != "none":
            options[f"offload_{what}"] = place
        if place == "nvme":
            options["nvme_path"] = folder
    _ask("deepspeed", options, asked)


def _read_megatron(given: dict[str, Any], asked: dict[str, Any]) -> None:
    if "megatron_lm_gradient_clipping" in given:
        asked["gradient_clipping"] = given.pop("megatron_lm_gradient_clipping")
    options = {"size": given.pop("megatron_lm_tp_degree")} if "megatron_lm_tp_degree" in given else {}
    if given.get("megatron_lm_pp_degree") == 1:
        given.pop("megatron_lm_pp_degree")
    _ask("megatron", options, asked)


def _ask(strategy: str, options: dict[str, Any], asked: dict[str, Any]) -> None:
    asked["strategy"] = strategy
    if options:
        asked[strategy] = options


def _read_fp8(given: dict[str, Any], asked: dict[str, Any]) -> None:
    backend = _FP8_BACKENDS.get(str(given.get("backend", "")).lower())
    if asked.get("mixed_precision") == "fp8" and backend is not None:
        given.pop("backend")
        asked["fp8"] = {"backend": backend}


def _read_compile(given: dict[str, Any], asked: dict[str, Any]) -> None:
    """torch.compile with inductor; any other backend stays in the section."""
    backend = str(given.get("dynamo_backend", "no")).lower()
    if backend in ("no", "none"):
        given.clear()
    elif backend == "inductor":
        given.pop("dynamo_backend")
        mode = given.pop("dynamo_mode", "default")
        asked["compile"] = True if mode == "default" else mode
        for name in [name for name, value in given.items() if not value]:
            given.pop(name)


_Read = Callable[[dict[str, Any], dict[str, Any]], None]
_SECTIONS: dict[str, tuple[str | None, _Read]] = {
    "fsdp_config": ("FSDP", _read_fsdp),
    "deepspeed_config": ("DEEPSPEED", _read_deepspeed),
    "megatron_lm_config": ("MEGATRON_LM", _read_megatron),
    "fp8_config": (None, _read_fp8),
    "dynamo_config": (None, _read_compile),
}
"""The type of run that each belongs to (None: to any), and what reads it."""
