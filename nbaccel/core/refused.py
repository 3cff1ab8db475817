"""Names of the peer's Accelerator that are refused here, each with our way of doing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbaccel.checks import nearest
from nbaccel.errors import ConfigError

__all__ = [
    "ARGUMENTS",
    "ATTRIBUTES",
    "LOADER",
    "PARAMETERS",
    "explain",
    "refuse_arguments",
    "refuse_parameters",
]

_DEEPSPEED = "is strategy=DeepSpeed(...)"
_PLACE = (
    "does not exist here: this rank's place among those with different data is acc.strategy.data_axis.rank, and ranks "
    "that share a model or a sequence are neighbours in process_index"
)

_FP8 = "is Accelerator(mixed_precision='fp8', fp8=FP8Options(...)); what was asked is acc.config.fp8"

ATTRIBUTES: Mapping[str, str] = {
    "context_parallel_rank": _PLACE,
    "data_parallel_rank": "is acc.strategy.data_axis.rank here",
    "data_parallel_shard_rank": _PLACE,
    "dataloader_config": "is split_batches, even_batches, dispatch_batches of the Accelerator itself",
    "deepspeed_plugin": "does not exist here; what was asked is acc.config.deepspeed",
    "deepspeed_ulysses_dl_adapter": "does not exist here; ContextParallel and acc.maybe_context_parallel cut sequences",
    "fp8_backend": "is FP8Options(backend=...), given as Accelerator(fp8=...)",
    "gradient_state": "is sync_gradients and gradient_accumulation_steps of the Accelerator itself; a prepared loader "
    "has at_end",
    "is_composable_parallelism_enabled": "does not exist here; what goes together is "
    "strategy=FSDP(tensor_parallel=..., context_parallel=...)",
    "is_fsdp2": "is `acc.strategy.name == 'fsdp'` here; there is no older FSDP",
    "logging_dir": "is project_dir here",
    "lomo_backward": "does not exist here; LOMO fuses the optimizer into backward: call it yourself",
    "non_blocking": "is always so here: batches are moved to the device asynchronously",
    "parallelism_config": "does not exist here; what was asked is acc.config.strategy and what it names, such as "
    "acc.config.fsdp",
    "pipeline_parallel_rank": _PLACE,
    "project_configuration": "is project_dir here, and acc.config.keep",
    "save": "is torch.save on the main process: `if acc.is_main_process: torch.save(obj, path)`",
    "save_iteration": "does not exist here; checkpoint folders are numbered by what is there",
    "scaler": "does its work inside step() and clip_grad_norm_(); its options are "
    "Accelerator(scaler=ScalerOptions(...))",
    "should_save_model": "does not exist here; save_state is called on all ranks, and each writes its part",
    "skip_first_batches": "is loader.skip_batches(count) here, on the prepared loader, and reads none of what it "
    "skips; load_state() and resume='auto' put loaders where they were by themselves",
    "state": "is the Accelerator itself: process_index, num_processes, device, mixed_precision, ...",
    "tensor_parallel_rank": _PLACE,
    "torch_device_mesh": _PLACE,
    "trackers": "are asked for by name: acc.get_tracker(name)",
    "use_seedable_sampler": "is always so here: orders come from (seed, epoch)",
    "use_stateful_dataloader": "is always so here: every prepared loader has state_dict",
    "verify_device_map": "does not exist here; dispatch_model(model, ...) says what does not fit",
    "ao_recipe_handler": _FP8,
    "te_recipe_handler": _FP8,
    "fp8_recipe_handler": _FP8,
    "msamp_recipe_handler": _FP8,
    "has_fp8_handler": _FP8,
    "delayed_fp8_autocast": _FP8,
    "fp8_enabled": "is `acc.mixed_precision == 'fp8'` here",
    "autocast_handler": "does not exist here; acc.autocast takes enabled= and cache_enabled=",
    "ddp_handler": "is Accelerator(ddp=DDPOptions(...)); what was asked is acc.config.ddp",
    "scaler_handler": "is Accelerator(scaler=ScalerOptions(...))",
    "init_handler": "does not exist here; the process group's timeout is collective_timeout of the launch",
    "profile_handler": "does not exist here; acc.profile takes the options of torch.profiler.profile by their names",
    "device_placement": "is given per prepare_model(device_placement=...) here",
    "flag_tensor": "does not exist here; set_trigger() and check_trigger() are here",
    "has_lomo_optimizer": "does not exist here; LOMO fuses the optimizer into backward: call it yourself",
    "log_with": "is acc.config.log_with here; a tracker is asked for by name: acc.get_tracker(name)",
    "native_amp": "is always so here; the precision is acc.mixed_precision",
    "rng_types": "is not needed: loaders' orders come from (seed, epoch), equal on all ranks",
    "step_scheduler_with_optimizer": "is acc.config.step_scheduler_with_optimizer here",
}

_ORDERS = "is not needed: orders come from (seed, epoch), equal on all ranks"
_PASSES = "is not needed: the loop over a prepared loader says when a pass begins and when it ends"
LOADER: Mapping[str, str] = {
    "adjust_state_dict_for_prefetch": "is not needed: state_dict counts what the loop has consumed",
    "base_dataloader": "is loader.dataloader here",
    "begin": _PASSES,
    "end": _PASSES,
    "end_of_dataloader": "is loader.at_end here",
    "get_sampler": "is loader.sampler here",
    "gradient_state": "is sync_gradients and gradient_accumulation_steps of the Accelerator, and loader.at_end",
    "iteration": "is loader.epoch here",
    "remainder": "is loader.batch_samples here, of the batch in hand; gather_for_metrics leaves out what is repeated",
    "reset": _PASSES,
    "rng_types": _ORDERS,
    "set_sampler": "does not exist here: give the sampler to the DataLoader before it is prepared",
    "split_batches": "is acc.config.split_batches here",
    "synchronized_generator": _ORDERS,
    "total_dataset_length": "is len(loader.dataset) here; loader.total_samples is what an epoch gives over all ranks",
    "use_stateful_dataloader": "is always so here: every prepared loader has state_dict",
}
"""Names of the peer's prepared loaders."""

SET_SYNC_GRADIENTS = (
    "accelerator.sync_gradients cannot be set: the window says when a step is due. accelerator.accumulate(model) "
    "begins the next micro-step, gradient_accumulation_steps can be set between two windows, and "
    "`with no_sync(model):` keeps gradients on their rank"
)

ARGUMENTS: Mapping[str, str] = {
    "dataloader_config": "is split_batches=, even_batches=, dispatch_batches=, shard= of the Accelerator itself",
    "deepspeed_plugin": _DEEPSPEED,
    "deepspeed_plugins": _DEEPSPEED,
    "fsdp_plugin": "is strategy=FSDP(...); see docs/strategies.md",
    "torch_tp_plugin": "is strategy=TensorParallel(...) or FSDP(tensor_parallel=TensorParallel(...))",
    "megatron_lm_plugin": "is strategy=Megatron(...), or by torch TensorParallel(...) or Pipeline(...); "
    "see docs/strategies.md",
    "parallelism_config": "is strategy=FSDP(sharding=..., tensor_parallel=TensorParallel(...), "
    "context_parallel=ContextParallel(...)), TensorParallel(...) or ContextParallel(...)",
    "rng_types": "is not needed: loaders' orders come from (seed, epoch), equal on all ranks; "
    "nbaccel.core.rng.synchronize_rng_states does it by hand",
    "project_config": "is project_dir= and keep=",
    "gradient_accumulation_plugin": "is gradient_accumulation_steps= and loss_weighting=",
    "kwargs_handlers": "is ddp=DDPOptions(...), scaler=ScalerOptions(...) and fp8=FP8Options(...)",
    "dynamo_backend": "is compile=True or a mode of torch.compile",
    "dynamo_plugin": "is compile=True or a mode of torch.compile",
}


PARAMETERS: Mapping[str, str] = {
    "autocast_handler": "does not exist here; give enabled= and cache_enabled=",
    "load_kwargs": "does not exist here; options are strict= and allow_pickle=",
    "log_kwargs": "does not exist here; a tracker's own options go to its own object: "
    "acc.get_tracker(name, unwrap=True)",
    "profile_handler": "does not exist here; give the options of torch.profiler.profile by their names",
    "safe_serialization": "is always so here: weights are written as safetensors",
    "slice_fn_for_dispatch": "does not exist here; give shard= a function of (samples' indices, number of ranks)",
}


def refuse_parameters(method: str, unknown: Mapping[str, Any]) -> None:
    """Raises for what the peer's method takes and ours does not; what asks for what is done anyway is taken.

    Raises:
        ConfigError: naming our way.
        TypeError: nobody's method takes it.
    """
    for name, value in unknown.items():
        if name == "safe_serialization" and value is True:
            continue
        if name in PARAMETERS:
            raise ConfigError(f"accelerator.{method}(..., {name}=...) {PARAMETERS[name]}")
        raise TypeError(f"accelerator.{method} takes no argument {name!r}")


def explain(name: str) -> str:
    """Why the Accelerator has no attribute `name`, and what to use."""
    if name in ATTRIBUTES:
        return f"accelerator.{name} {ATTRIBUTES[name]}"
    return f"'Accelerator' object has no attribute {name!r}"


def refuse_arguments(unknown: Mapping[str, Any]) -> None:
    """Raises for arguments the Accelerator does not take.

    Raises:
        ConfigError: naming our way, or the nearest argument.
    """
    for name in unknown:
        if name in ARGUMENTS:
            raise ConfigError(f"Accelerator(..., {name}=...) {ARGUMENTS[name]}")
        raise ConfigError(f"Accelerator takes no argument {name!r}{_nearest(name)}")


def _nearest(name: str) -> str:
    from nbaccel.core.accelerator import Accelerator  # at the time of the error only: it imports us

    code = Accelerator.__init__.__code__
    known = code.co_varnames[1 : 1 + code.co_kwonlyargcount]
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else ""
