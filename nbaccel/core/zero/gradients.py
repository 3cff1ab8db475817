"""Gradients between the last backward of a window and the step, wherever ZeRO keeps them: their norm, their scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbaccel.core.zero.flat import flats
from nbaccel.core.zero.swapping import gradients_in_memory

__all__ = ["forget_norm", "norm_for_step", "scale"]

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
    if not getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False)):
        return
    # Under offload they are beside the float32 parameters already, and their norms were taken on the way.
    factor = float(ratio)
    for sub_group, flat in enumerate(flats(zero)):
        with gradients_in_memory(zero, sub_group):
            if flat.tensor.grad is not None:
                flat.tensor.grad.mul_(factor)
    for name, norm in zero.norm_for_param_grads.items():
        zero.norm_for_param_grads[name] = norm * factor
