"""From our options, and a file of the user's own, to the dict DeepSpeed is initialised with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbaccel.core.plan.memory import zero_buckets
from nbaccel.core.plan.size import Size
from nbaccel.core.zero.nvme import places
from nbaccel.errors import ConfigError
from nbaccel.parallel import DeepSpeed, read_deepspeed

__all__ = ["settings", "with_stage_of_file"]

_LOOP_S = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "gradient_clipping"),
)
"""What the loop and the loaders decide, whatever the user's file says of it."""


def settings(
    options: DeepSpeed,
    *,
    stage: int,
    size: Size,
    num_processes: int,
    precision: str,
    accumulation: int,
    clipping: float | None,
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    The loop decides where a window ends, so DeepSpeed is told of one micro-step, and of the boundary itself.

    Raises:
        ConfigError: the user's file asks for something else than the Accelerator.
    """
    given = {} if options.config is None else read_deepspeed(options.config)
    _check(given, accumulation=accumulation, precision=precision, clipping=clipping, stage=stage)
    filled: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0; the loop's clip_grad_norm_ sets it step by step
        "zero_optimization": _zero(options, stage, size, num_processes),
        **_numbers(options, stage, precision),
        "zero_allow_untested_optimizer": True,  # which are refused is decided in the strategy
        "zero_force_ds_cpu_optimizer": False,  # would compile one of its own
    }
    merged = _merge(filled, {name: value for name, value in given.items() if name not in _LOOP_S})
    if (gathered := merged["zero_optimization"]["allgather_bucket_size"]) % 2:
        raise ConfigError(f"allgather_bucket_size is {gathered}; DeepSpeed takes an even number of elements")
    for name, place in (on_nvme := places(merged)).items():
        if stage != 3:
            raise ConfigError(f"offload to 'nvme' needs stage 3 of ZeRO, and the stage is {stage}")
        merged["zero_optimization"][name] = {**_buffers(name, size, num_processes), **place}
    if "offload_param" in on_nvme:
        _fetch_one_by_one(merged["zero_optimization"], asked=options.prefetch_bucket_size, given=given)
    return merged


def _zero(options: DeepSpeed, stage: int, size: Size, num_processes: int) -> dict[str, Any]:
    """How the model is divided: DeepSpeed's "zero_optimization"."""
    overlap = stage == 3 if options.overlap_comm is None else options.overlap_comm
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    ours = zero_buckets(size, num_processes, offloaded=options.offload_param is not None)
    sizes = {
        "reduce_bucket_size": (options.reduce_bucket_size, ours.reduce),
        "allgather_bucket_size": (options.allgather_bucket_size, ours.reduce + ours.reduce % 2),
    }
    if stage == 3:
        sizes |= {
            "stage3_prefetch_bucket_size": (options.prefetch_bucket_size, ours.prefetch),
            "stage3_max_live_parameters": (options.max_live_parameters, ours.live),
            "stage3_max_reuse_distance": (options.max_live_parameters, ours.live),
            "stage3_param_persistence_threshold": (options.param_persistence_threshold, ours.persistent),
            "sub_group_size": (None, ours.sub_group),
        }
        if options.leaf_modules:
            zero["leaf_module"] = {"classes": list(options.leaf_modules)}
    zero |= {name: own if asked is None else asked for name, (asked, own) in sizes.items()}
    for name in ("offload_optimizer", "offload_param"):
        place = getattr(options, name)
        if place is not None:
            zero[name] = {"device": place, **({"nvme_path": options.nvme_path} if place == "nvme" else {})}
    return zero


def _numbers(options: DeepSpeed, stage: int, precision: str) -> dict[str, Any]:
    """In which types is computed, added up and sent."""
    found: dict[str, Any] = {kind: {"enabled": precision == kind and stage > 0} for kind in ("bf16", "fp16")}
    if precision != "no" and stage > 1:
        # Micro-steps add up in float32, as elsewhere; stage 1 would take another optimizer for it.
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    sent = options.communication_dtype or ("fp32" if precision != "no" else None)
    return found if sent is None else {**found, "communication_data_type": sent}


def _buffers(name: str, size: Size, num_processes: int) -> dict[str, int]:
    """What is kept in memory of what is offloaded to NVMe."""
    if name == "offload_optimizer":
        # A parameter, its gradient, and the three moments that AMSGrad and centred RMSprop have.
        return {"buffer_count": 5}
    # DeepSpeed would leave the first 10⁹ numbers in the host's memory.
    return {"buffer_size": max(-(-size.largest_parameter // num_processes), 10**6), "max_in_cpu": 0}


def _fetch_one_by_one(zero: dict[str, Any], *, asked: int | None, given: Mapping[str, Any]) -> None:
    """Parameters come from the disk when they are needed, and go at once.

    DeepSpeed 0.19.8 ends with an assertion when it fetches ahead a parameter that is used twice within reach, as the
    last ones of a forward pass are; and one that waits for its next use keeps its buffer, of which there are few.
    """
    name = "stage3_prefetch_bucket_size"
    own = given.get("zero_optimization", {}).get(name)
    if asked or own not in (None, "auto", 0):
        raise ConfigError(
            "prefetching parameters cannot go with offload_param='nvme': DeepSpeed 0.19.8 fails in it. Leave out "
            f"prefetch_bucket_size, and {name} of the configuration"
        )
    zero |= {name: 0, "stage3_max_reuse_distance": 0}


def with_stage_of_file(options: DeepSpeed) -> DeepSpeed:
    """`options` with the stage of the user's own configuration, where they leave it open and it does not.

    Raises:
        ConfigError: the configuration cannot be read, or there is no such stage.
    """
    if options.stage != "auto" or options.config is None:
        return options
    stage = read_deepspeed(options.config).get("zero_optimization", {}).get("stage", "auto")
    return replace(options, stage=stage)


def _check(
    given: Mapping[str, Any], *, accumulation: int, precision: str, clipping: float | None, stage: int
) -> None:
    for name in ("optimizer", "scheduler"):
        if name in given:
            raise ConfigError(
                f"the DeepSpeed configuration has {name!r}; make it in the script and give it to prepare(model, "
                f"{name}), and take it out of the configuration"
            )
    asked = {
        "gradient_accumulation_steps": (given.get("gradient_accumulation_steps"), accumulation),
        "gradient_clipping": (given.get("gradient_clipping"), clipping),
        "zero_optimization.stage": (given.get("zero_optimization", {}).get("stage"), stage),
        "bf16.enabled": (given.get("bf16", {}).get("enabled"), precision == "bf16"),
        "fp16.enabled": (given.get("fp16", {}).get("enabled"), precision == "fp16"),
    }
    for name, (value, ours) in asked.items():
        if value not in (None, "auto") and value != ours and not (name == "gradient_clipping" and not value):
            raise ConfigError(
                f"{name} is {value!r} in the DeepSpeed configuration and {ours!r} for the Accelerator. Ask for it "
                'in one place, or write "auto" in the configuration.'
            )


def _merge(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `ours`; "auto" takes ours, and is left out where there is none."""
    merged = dict(ours)
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = ours.get(name)
            merged[name] = _merge(inner if isinstance(inner, Mapping) else {}, value)
        elif value != "auto":
            merged[name] = value
    return merged
