"""Gradients between the last backward of a window and the step, wherever ZeRO keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbaccel.core.zero.swapping import gradients_in_memory

__all__ = ["flats", "scale"]


def flats(zero: Any) -> list[Tensor]:
    """The flat float32 tensors that the user's optimizer steps: one per group, or per sub-group in stage 3."""
    stage3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if stage3 is None else stage3)


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
            if flat.grad is not None:
                flat.grad.mul_(factor)
    for name, norm in zero.norm_for_param_grads.items():
        zero.norm_for_param_grads[name] = norm * factor
