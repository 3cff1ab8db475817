"""DeepSpeed's inference engine: a Hugging Face model whose layers are divided over all ranks, or one left whole.

What runs on the CPU is taken: its automatic tensor parallelism and its choice of a type. Its fused kernels, CUDA
graphs and quantised weights need CUDA devices and are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nbaccel.core.world import World
from nbaccel.core.zero.library import import_deepspeed
from nbaccel.errors import ConfigError
from nbaccel.whole import is_dtensor

__all__ = ["inference_engine"]

_KERNELS = "needs DeepSpeed's CUDA kernels, of which nothing could be run; leave it out"
_REFUSED: Mapping[str, str] = {
    "kernel_inject": _KERNELS,
    "replace_with_kernel_inject": _KERNELS,
    "enable_cuda_graph": _KERNELS,
    "use_triton": _KERNELS,
    "quant": _KERNELS,
    "mp_size": "is tensor_parallel= here",
    "tp_size": "is tensor_parallel= here",
    "checkpoint": "does not exist here: load the weights first (acc.load_model, load_checkpoint_and_dispatch)",
    "zero": "does not exist here: under strategy=DeepSpeed(stage=3) a prepared model is called and generates as it is",
    "moe": "was not run; call deepspeed.init_inference yourself",
}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def inference_engine(
    model: nn.Module,
    *,
    world: World,
    tensor_parallel: int,
    dtype: torch.dtype | None,
    unknown: Mapping[str, Any],
) -> nn.Module:
    """DeepSpeed's engine around `model`, which is changed in place and set to evaluation.

    Called by all ranks together, with the same weights on each.

    Args:
        tensor_parallel: 1, or all ranks.
        dtype: None: that of the model's own parameters.

    Raises:
        ConfigError: an option that needs CUDA, or a model that DeepSpeed cannot divide; nothing has been changed.
    """
    _refuse(unknown)
    _check_plain(model)
    deepspeed = import_deepspeed(world, "prepare_inference")
    if tensor_parallel not in (1, world.size):
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel} and there are {world.size} ranks: DeepSpeed's inference divides a "
            "model over all ranks or over none (tensor_parallel=1)"
        )
    held = dtype or _type_of(model)
    if held not in deepspeed.accelerator.get_accelerator().supported_dtypes() or held not in _TYPES:
        raise ConfigError(
            f"DeepSpeed's inference does not compute in {held} on {world.device.type}; give dtype=torch.float32 or "
            "torch.bfloat16"
        )
    if tensor_parallel > 1:
        _check_divisible(model, tensor_parallel)
        # DeepSpeed keeps its first group for ever, which is not that of a session's later runs.
        deepspeed.InferenceEngine.inference_mp_group = None
    engine: nn.Module = deepspeed.init_inference(
        model, dtype=held, tensor_parallel={"tp_size": tensor_parallel}, replace_with_kernel_inject=False
    )
    return engine.eval()


def _refuse(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        if name in _REFUSED:
            raise ConfigError(f"prepare_inference(..., {name}=...) {_REFUSED[name]}")
        raise TypeError(f"prepare_inference takes no argument {name!r}")


def _check_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{name} has no values (it is on the meta device): load the weights before prepare_inference"
            )
        if hasattr(parameter, "ds_id") or is_dtensor(parameter):
            raise ConfigError(
                f"{name} is in shards: prepare_inference takes the plain model, before prepare or built anew"
            )


def _type_of(model: nn.Module) -> torch.dtype:
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(types) > 1:
        named = ", ".join(sorted(map(str, types)))
        raise ConfigError(
            f"the model has parameters in {named}: give dtype=, which all of them are converted to"
        )
    return types.pop() if types else torch.float32


def _check_divisible(model: nn.Module, ranks: int) -> None:
    """What DeepSpeed would find out after it had changed half of the model, or say with an assertion."""
    from deepspeed.module_inject.auto_tp import AutoTP

    try:
        AutoTP.tp_parser(model)
    except AssertionError as error:
        raise ConfigError(
            f"DeepSpeed cannot divide a {type(model).__name__} for inference ({str(error).partition('.')[0]}): use "
            "strategy=TensorParallel(size=…) with acc.prepare_model(model, evaluation_mode=True), or tensor_parallel=1"
        ) from error
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise ConfigError(f"{heads} attention heads cannot be divided over {ranks} ranks")
