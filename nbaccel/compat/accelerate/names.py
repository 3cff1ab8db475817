"""Where each of accelerate's names lives; nothing is imported before it is used.

`accelerate` and `accelerate.utils` offer them alike, for scripts take the same name from either.
"""

from __future__ import annotations

import dis
import importlib
import sys
from importlib.util import find_spec
from types import FrameType
from typing import Any

from nbaccel.checks import nearest
from nbaccel.compat.accelerate.refused import REFUSED

__all__ = ["HOMES", "look_up"]

_HERE = "nbaccel.compat.accelerate"
_NAMES = {
    f"{_HERE}.accelerator": "Accelerator",
    f"{_HERE}.big_modeling": "cpu_offload cpu_offload_with_hook disk_offload dispatch_model "
    "load_checkpoint_and_dispatch load_checkpoint_in_model",
    f"{_HERE}.data_loader": "DataLoaderDispatcher DataLoaderShard SeedableRandomSampler prepare_data_loader "
    "skip_first_batches",
    f"{_HERE}.hooks": "UserCpuOffloadHook remove_hook_from_module remove_hook_from_submodules",
    f"{_HERE}.logging": "get_logger",
    f"{_HERE}.optimizer": "AcceleratedOptimizer",
    f"{_HERE}.scheduler": "AcceleratedScheduler",
    f"{_HERE}.tracking": "GeneralTracker on_main_process",
    f"{_HERE}.parallelism_config": "ParallelismConfig",
    f"{_HERE}.launchers": "debug_launcher notebook_launcher",
    f"{_HERE}.state": "AcceleratorState GradientState PartialState is_initialized",
    f"{_HERE}.utils.dataclasses": "AORecipeKwargs AutocastKwargs ComputeEnvironment DDPCommunicationHookType "
    "DataLoaderConfiguration DistributedDataParallelKwargs DistributedType DynamoBackend FP8RecipeKwargs "
    "GradScalerKwargs GradientAccumulationPlugin InitProcessGroupKwargs KwargsHandler LoggerType PrecisionType "
    "ProfileKwargs ProjectConfiguration RNGType TERecipeKwargs",
    f"{_HERE}.utils.constants": "FSDP_MODEL_NAME MODEL_NAME OPTIMIZER_NAME PROFILE_PATTERN_NAME RNG_STATE_NAME "
    "SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME SAFE_WEIGHTS_PATTERN_NAME SAMPLER_NAME SCALER_NAME "
    "SCHEDULER_NAME WEIGHTS_INDEX_NAME WEIGHTS_NAME WEIGHTS_PATTERN_NAME",
    f"{_HERE}.utils.deepspeed": "DummyOptim DummyScheduler get_active_deepspeed_plugin",
    f"{_HERE}.utils.fsdp_utils": "merge_fsdp_weights",
    f"{_HERE}.utils.memory": "clear_device_cache release_memory should_reduce_batch_size",
    f"{_HERE}.utils.modeling": "convert_file_size_to_int get_balanced_memory get_max_memory "
    "infer_auto_device_map load_state_dict named_module_tensors set_module_tensor_to_device",
    f"{_HERE}.utils.plugins": "DeepSpeedPlugin FullyShardedDataParallelPlugin TorchDynamoPlugin "
    "TorchTensorParallelPlugin",
    f"{_HERE}.utils.operations": "DistributedOperationException broadcast broadcast_object_list concatenate "
    "convert_outputs_to_fp32 convert_to_fp32 copy_tensor_to_devices find_batch_size find_device gather "
    "gather_object honor_type is_namedtuple is_torch_tensor listify pad_across_processes recursively_apply reduce "
    "send_to_device slice_tensors",
    f"{_HERE}.utils.other": "convert_bytes extract_model_from_parallel is_compiled_module merge_dicts "
    "patch_environment save set_seed str_to_bool synchronize_rng_state synchronize_rng_states tqdm wait_for_everyone",
    f"{_HERE}.utils.versions": "compare_versions is_torch_version",
    "nbaccel": "find_executable_batch_size find_tied_parameters init_empty_weights init_on_device retie_parameters",
}
HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def look_up(module: str, name: str) -> Any:
    """What a module's `__getattr__` answers: the object behind `name`, or the module of that name below it.

    `is_<package>_available` is made for any package.

    Raises:
        AttributeError: there is no such name here; the message says what to do instead.
        ImportError: the same, for `from module import name`, which would not show an AttributeError's message.
    """
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    if name.startswith("is_") and name.endswith("_available"):
        return getattr(importlib.import_module(f"{_HERE}.utils.imports"), name)
    below = f"{module}.{name}"
    if name.isidentifier() and "__path__" in vars(sys.modules[module]) and find_spec(below) is not None:
        return importlib.import_module(below)
    message = f"{module}.{name} {REFUSED[name]}" if name in REFUSED else _unknown(module, name)
    if _imports_from(sys._getframe(1).f_back):
        raise ImportError(message, name=module)
    raise AttributeError(message)


def _unknown(module: str, name: str) -> str:
    close = nearest(name, HOMES)
    meant = f"did you mean {close!r}? " if close else ""
    return f"module {module!r} has no {name!r}: {meant}docs/migration.md lists what there is"


def _imports_from(frame: FrameType | None) -> bool:
    """Whether the frame is at the `name` of a `from module import name`; `hasattr` and `getattr` are calls."""
    if frame is None:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    while code[at] == dis.EXTENDED_ARG:
        at += 2
    return code[at] == dis.opmap["IMPORT_FROM"]
