"""Where each of accelerate's names lives; nothing is imported before it is used.

`accelerate` and `accelerate.utils` offer them alike, for scripts take the same name from either.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["HOMES", "look_up"]

_HERE = "nbaccel.compat.accelerate"
_NAMES = {
    f"{_HERE}.accelerator": "Accelerator",
    f"{_HERE}.data_loader": "DataLoaderDispatcher DataLoaderShard SeedableRandomSampler prepare_data_loader "
    "skip_first_batches",
    f"{_HERE}.logging": "get_logger",
    f"{_HERE}.tracking": "GeneralTracker on_main_process",
    f"{_HERE}.parallelism_config": "ParallelismConfig",
    f"{_HERE}.launchers": "debug_launcher notebook_launcher",
    f"{_HERE}.state": "AcceleratorState GradientState PartialState",
    f"{_HERE}.utils.dataclasses": "AORecipeKwargs AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration "
    "DistributedDataParallelKwargs DistributedType FP8RecipeKwargs GradScalerKwargs GradientAccumulationPlugin "
    "InitProcessGroupKwargs LoggerType PrecisionType ProfileKwargs ProjectConfiguration RNGType TERecipeKwargs",
    f"{_HERE}.utils.constants": "SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME",
    f"{_HERE}.utils.deepspeed": "DummyOptim DummyScheduler get_active_deepspeed_plugin",
    f"{_HERE}.utils.plugins": "DeepSpeedPlugin FullyShardedDataParallelPlugin TorchDynamoPlugin "
    "TorchTensorParallelPlugin",
    f"{_HERE}.utils.operations": "DistributedOperationException broadcast broadcast_object_list concatenate "
    "convert_outputs_to_fp32 convert_to_fp32 copy_tensor_to_devices find_batch_size find_device gather "
    "gather_object honor_type is_namedtuple is_torch_tensor listify pad_across_processes recursively_apply reduce "
    "send_to_device slice_tensors",
    f"{_HERE}.utils.other": "extract_model_from_parallel patch_environment release_memory save set_seed "
    "str_to_bool synchronize_rng_state synchronize_rng_states tqdm wait_for_everyone",
    "nbaccel": "cpu_offload disk_offload dispatch_model find_executable_batch_size find_tied_parameters "
    "infer_auto_device_map init_empty_weights init_on_device load_checkpoint_and_dispatch retie_parameters",
}
HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def look_up(module: str, name: str) -> Any:
    """The object behind `name`, asked of `module`; `is_<package>_available` is made for any package.

    Raises:
        AttributeError: there is no such name here.
    """
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    if name.startswith("is_") and name.endswith("_available"):
        return getattr(importlib.import_module(f"{_HERE}.utils.imports"), name)
    raise AttributeError(f"module {module!r} has no {name!r}; what there is: {', '.join(sorted(HOMES))}")
