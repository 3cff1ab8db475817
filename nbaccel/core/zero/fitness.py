"""What cannot go with ZeRO, said before DeepSpeed fails over it; much of it in the middle of the first step only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from nbaccel.errors import ConfigError
from nbaccel.parallel import DeepSpeed

__all__ = ["refuse_unfit", "unfit", "widened"]

_ELEMENTWISE = (
    *("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"),
    *("Lion", "FusedAdam", "DeepSpeedCPUAdam", "FusedLion", "DeepSpeedCPULion"),
)
"""Optimizers that treat each number by itself; ZeRO gives them flat pieces, not the parameters' shapes."""

_NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def unfit(optimizers: Sequence[Optimizer], options: DeepSpeed) -> str:
    """Why the optimizers that came with a model cannot go with ZeRO, and what to do; empty if they can."""
    if len(optimizers) != 1:
        return (
            f"strategy 'deepspeed' needs the model with its one optimizer, prepare(model, optimizer); "
            f"{len(optimizers)} came with it. A model that is not trained: prepare_model(model, "
            "evaluation_mode=True)"
        )
    kind = type(optimizers[0]).__name__
    if kind == "Adagrad" and options.offload_optimizer == "nvme":
        return (
            "Adagrad cannot be offloaded to 'nvme': DeepSpeed makes its sums while the parameters are on the disk, "
            "where they have no size. Use offload_optimizer='cpu', or another optimizer"
        )
    if options.stage != 0 and kind not in _ELEMENTWISE and not options.untested_optimizer:
        return (
            f"{kind} cannot go with ZeRO, which gives an optimizer flat pieces of all parameters together: it may "
            f"need their shapes. Use one that treats each number by itself ({', '.join(_ELEMENTWISE[:6])}…), "
            "strategy 'fsdp', or DeepSpeed(untested_optimizer=True) if you know it does"
        )
    return ""


def refuse_unfit(module: nn.Module, optimizer: Optimizer, *, stage: int, dtype: torch.dtype | None) -> None:
    """Checks the model, and its optimizer, for one of its stages.

    Args:
        dtype: what the mixed precision computes in; None for float32.

    Raises:
        ConfigError: one of them does not fit; what to do instead is said.
    """
    _refuse_module(module, stage, dtype)
    kinds = {p.dtype: name for name, p in module.named_parameters() if p.requires_grad}
    if dtype is not None:
        kinds = {kind: name for kind, name in kinds.items() if not kind.is_floating_point} or {dtype: ""}
    if stage == 3 and len(kinds) > 1:
        said = " and ".join(f"{name} is {kind}" for kind, name in list(kinds.items())[:2])
        raise ConfigError(
            f"{said}, and stage 3 of ZeRO keeps all parameters in one memory: give them one type (model.float()), or "
            "use stage 2 with a group of the optimizer for each, or strategy 'ddp'"
        )
    _refuse_groups(module, optimizer, stage, dtype)


def widened(module: nn.Module, *, stage: int, dtype: torch.dtype | None) -> str:
    """What to know of a model that is narrower than its mixed precision; empty if it is not.

    Args:
        dtype: what the mixed precision computes in; None for float32.
    """
    narrow = next((p.dtype for p in module.parameters() if p.requires_grad and p.dtype in _NARROW), None)
    if not stage or dtype is not None or narrow is None:
        return ""
    return (
        f"parameters of the model are {narrow}, and mixed_precision is 'no': ZeRO computes in that type and steps a "
        "float32 copy, which get_state_dict and checkpoints hold. Ask for mixed_precision="
        f"'{_NARROW[narrow]}', which sums gradients up in float32 too, or train model.float()"
    )


def _refuse_module(module: nn.Module, stage: int, dtype: torch.dtype | None) -> None:
    if "_orig_mod" in module._modules:
        raise ConfigError(
            "torch.compile was called on the model before prepare, and DeepSpeed's engine cannot follow its calls: "
            "give the model itself, and Accelerator(compile=True)"
        )
    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            raise ConfigError(
                f"{name} is a parameter without a dimension, which DeepSpeed 0.19.8 cannot send to other ranks; give "
                "it one, torch.ones(1), or use strategy 'ddp'"
            )
        if stage == 3 and not getattr(parameter, "ds_numel", parameter.numel()):
            raise ConfigError(
                f"{name} is a parameter without elements, which stage 3 of DeepSpeed 0.19.8 cannot gather; take it "
                "out, or use stage 2, or strategy 'fsdp'"
            )
        if stage != 3 and hasattr(parameter, "ds_tensor"):
            raise ConfigError(
                f"the model was built under zero.Init, in shards, which stage {stage} of ZeRO does not have; ask "
                "for DeepSpeed(stage=3), or build it without"
            )
    for name, one in module.named_modules() if stage else ():
        weight = one._parameters.get("weight")
        if getattr(one, "sparse", False) is True and weight is not None and weight.requires_grad:
            raise ConfigError(
                f"{name or 'the model'} is an {type(one).__name__}(sparse=True), whose sparse gradient ZeRO cannot "
                "divide: make it with sparse=False, or use strategy 'ddp'"
            )
    norms = [f"{name} is a {type(one).__name__}" for name, one in module.named_modules() if _keeps(one)]
    if norms and stage and dtype is not None:
        raise ConfigError(
            f"{norms[0]}, whose statistics are float32 where ZeRO makes its parameters {dtype}, and torch's kernels "
            "want one type: use GroupNorm or LayerNorm in its place, mixed_precision='no', or strategy 'fsdp' or 'ddp'"
        )


def _keeps(module: nn.Module) -> bool:
    """Whether it is a batch norm that keeps statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _refuse_groups(module: nn.Module, optimizer: Optimizer, stage: int, dtype: torch.dtype | None) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        if stage and not any(parameter.requires_grad for parameter in group["params"]):
            raise ConfigError(
                f"nothing in group {number} of the optimizer learns, which DeepSpeed 0.19.8 does not expect; leave "
                "the group out, or use strategy 'fsdp'"
            )
        kinds = {parameter.dtype for parameter in group["params"] if parameter.requires_grad}
        if stage and dtype is None and len(kinds) > 1:
            raise ConfigError(
                f"parameters of group {number} of the optimizer are {' and '.join(sorted(map(str, kinds)))}, and ZeRO "
                "keeps a group in one memory, in the wider type: give them one type (model.float()), groups of their "
                "own, or use strategy 'ddp'"
            )
        if any(id(parameter) not in own for parameter in group["params"]):
            raise ConfigError(
                f"group {number} of the optimizer has parameters that are not the model's, and ZeRO trains one model: "
                "put the models into one module whose forward calls them, or use strategy 'fsdp', or 'ddp' where they "
                "share parameters"
            )
