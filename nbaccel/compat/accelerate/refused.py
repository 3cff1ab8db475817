"""Names of accelerate's that are refused here, each with our way of doing it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED"]

_WHY = {
    "does not exist here: a pipeline over ranks is Accelerator(strategy=Pipeline(...)) of nbaccel, and one model "
    "over several devices of this process is dispatch_model(model)": "prepare_pippy",
    "does not exist here: put torch's own register_forward_pre_hook and register_forward_hook on the module; "
    "dispatch_model, cpu_offload and disk_offload bring weights and inputs to where they run": "AlignDevicesHook "
    "CpuOffload LayerwiseCastingHook ModelHook SequentialHook add_hook_to_module align_module_device "
    "attach_align_device_hook attach_align_device_hook_on_blocks attach_execution_device_hook",
    "does not exist here: dispatch_model(model, device_map, offload_folder=...) writes and reads what is on the disk": (
        "OffloadedWeightsLoader PrefixedDataset extract_submodules_state_dict load_offloaded_weight "
        "load_offloaded_weights offload_state_dict offload_weight save_offload_index"
    ),
    "does not exist here: infer_auto_device_map(model) weighs, groups and checks modules itself, and `nbaccel "
    "estimate` tells sizes": "calculate_maximum_sizes check_device_map check_tied_parameters_in_config "
    "check_tied_parameters_on_same_device clean_device_map compute_module_sizes dtype_byte_size "
    "get_max_layer_size id_tensor_storage",
    "does not exist here: accelerator.save_state and load_state keep sharded models and their optimizers, "
    "accelerator.save_model writes whole weights": "load_fsdp_model load_fsdp_optimizer save_fsdp_model "
    "save_fsdp_optimizer",
    "does not exist here: prepare does it under a FullyShardedDataParallelPlugin; a model that no rank can hold is "
    "made in init_empty_weights and filled by accelerator.load_model": "disable_fsdp_ram_efficient_loading "
    "enable_fsdp_ram_efficient_loading ensure_weights_retied fsdp2_apply_ac fsdp2_canonicalize_names "
    "fsdp2_load_full_state_dict fsdp2_prepare_model fsdp2_switch_optimizer_parameters get_fsdp2_grad_scaler",
    "does not exist here: ParallelismConfig(cp_size=...) cuts sequences and ParallelismConfig(tp_size=...) matrices; "
    "their options are those of nbaccel's ContextParallel and TensorParallel": "DeepSpeedSequenceParallelConfig "
    "TorchContextParallelConfig TorchTensorParallelConfig",
    "does not exist here: prepare gives back the optimizer and the scheduler of the script under DeepSpeedPlugin "
    "too; HfDeepSpeedConfig is that of transformers.integrations": (
        "DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedSchedulerWrapper HfDeepSpeedConfig "
        "map_pytorch_optim_to_deepspeed"
    ),
    "is Accelerator(strategy=Megatron(...)) of nbaccel, for models of megatron-core; torch's are TensorParallel(...) "
    "and Pipeline(...)": "AbstractTrainStep BertTrainStep GPTTrainStep MegatronEngine MegatronLMDummyDataLoader "
    "MegatronLMDummyScheduler MegatronLMOptimizerWrapper MegatronLMPlugin MegatronLMSchedulerWrapper T5TrainStep "
    "avg_losses_across_data_parallel_group gather_across_data_parallel_groups megatron_lm_initialize",
    "is Accelerator(mixed_precision='fp8', fp8=FP8Options(...)) of nbaccel, or AORecipeKwargs, TERecipeKwargs in "
    "kwargs_handlers": "MSAMPRecipeKwargs apply_fp8_autowrap contextual_fp8_autocast convert_model "
    "convert_model_to_fp8_ao filter_first_and_last_linear_layers has_ao_layers has_transformer_engine_layers",
    "does not exist here: quantise when the model is loaded, such as by transformers' quantization_config": (
        "BnbQuantizationConfig has_4bit_bnb_layers load_and_quantize_model"
    ),
    "is Accelerator(dynamo_plugin=TorchDynamoPlugin(backend='inductor')), which compiles repeated blocks once": (
        "compile_regions compile_regions_deepspeed compile_regions_fsdp2 has_compiled_regions"
    ),
    "does not exist here: prepare_data_loader divides a loader over the ranks by itself, and skip_first_batches "
    "begins it further on": "BatchSamplerShard DataLoaderAdapter DataLoaderStateMixin IterableDatasetShard "
    "SkipBatchSampler SkipDataLoader",
    "is asked by its name, Accelerator(log_with='wandb'), and got by accelerator.get_tracker('wandb'); your own is a "
    "GeneralTracker in log_with": "AimTracker ClearMLTracker CometMLTracker DVCLiveTracker MLflowTracker "
    "SwanLabTracker TensorBoardTracker TrackioTracker WandBTracker filter_trackers register_tracker_class",
    "is the launcher's business: `nbaccel launch`, `nbaccel config`, notebook_launcher": "PrepareForLaunch "
    "prepare_deepspeed_cmd_env prepare_multi_gpu_env prepare_simple_launcher_cmd_env prepare_tpu write_basic_config",
    "does not exist here: read os.environ": "get_int_from_env parse_choice_from_env parse_flag_from_env",
    "is torch.load": "load",
    "does not exist here: accelerator.save_state and load_state do it; your own objects join in by "
    "accelerator.register_for_checkpointing": "load_accelerator_state load_custom_state save_accelerator_state "
    "save_custom_state",
}
REFUSED: Mapping[str, str] = {name: why for why, names in _WHY.items() for name in names.split()}
