"""Gradients between the last backward of a window and the step, wherever ZeRO keeps them: their norm, their scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbaccel.core.zero.flat import flats
from nbaccel.core.zero.swapping import gradients_in_memory
from nbaccel.errors import ConfigError

__all__ = ["clear", "clip_values", "drop", "forget_norm", "norm_for_step", "scale"]

_NORMS = ("_get_norm_groups", "scaled_global_norm")
"""DeepSpeed's methods: of stage 3, which gives one norm for each sub-group; of stages 1 and 2."""


def norm_for_step(zero: Any) -> Tensor:
    """The norm of all gradients, still scaled; the step that follows would compute it once more, and is given it."""
    name = next(name for name in _NORMS if hasattr(zero, name))
    found = getattr(zero, name)()
    setattr(zero, name, lambda: found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.as_tensor(part) for part in parts]))
    return norm


def forget_norm(zero: Any) -> None:
    """Gradients are others now: DeepSpeed computes their norm itself."""
    for name in _NORMS:
        vars(zero).pop(name, None)


@torch.no_grad()
def scale(zero: Any, ratio: float | Tensor) -> None:
    """Multiplies them."""
    for kept in zero.averaged_gradients.values():
        for gradient in kept or ():
            gradient.mul_(ratio)
    if not _offloads(zero):
        return
    # Under offload they are beside the float32 parameters already, and their norms were taken on the way.
    factor = float(ratio)
    for sub_group, flat in enumerate(flats(zero)):
        with gradients_in_memory(zero, sub_group):
            if flat.tensor.grad is not None:
                flat.tensor.grad.mul_(factor)
    for name, norm in zero.norm_for_param_grads.items():
        zero.norm_for_param_grads[name] = norm * factor


@torch.no_grad()
def clip_values(zero: Any, clip_value: float) -> None:
    """Clips each number.

    Raises:
        ConfigError: they are offloaded, and their norms, which the step would take, are those of before.
    """
    if _offloads(zero):
        raise ConfigError(
            "clip_grad_value_ cannot go with an offloaded optimizer under ZeRO; use clip_grad_norm_, or leave "
            "offload_optimizer out"
        )
    forget_norm(zero)
    limit = clip_value * float(zero.loss_scale)
    for kept in zero.averaged_gradients.values():
        for gradient in kept or ():
            gradient.clamp_(-limit, limit)


@torch.no_grad()
def clear(zero: Any) -> None:
    """Zeros what DeepSpeed keeps gradients in from step to step (stage 3, and under offload): it writes the new ones
    there, and would step a parameter that has none by those of its last use."""
    kept: Tensor | None = getattr(zero, "grad_partitions_flat_buffer", None)
    if kept is not None:
        kept.zero_()
    for flat in flats(zero) if _offloads(zero) else ():
        if flat.tensor.grad is not None:
            flat.tensor.grad.zero_()


def drop(zero: Any) -> None:
    """Forgets them, and what was to be clipped; the next backward is the first of its window.

    DeepSpeed does so within its step only: without one it would add the next ones to them.
    """
    forget_norm(zero)
    if _offloads(zero) or any(kept is not None for kept in zero.averaged_gradients.values()):
        clear(zero)  # else the step has done it
    zero.clip_grad = 0.0
    zero.zero_grad(set_to_none=True)
    if not hasattr(zero, "fp32_partitioned_groups_flat"):  # stages 1 and 2; that of stage 3 has done it
        zero.micro_step_id = -1
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
    if _offloads(zero):
        zero.reset_cpu_buffers()


def _offloads(zero: Any) -> bool:
    return bool(getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False)))
