"""Tensors and models of which each rank holds a part (FSDP2, tensor parallelism, ZeRO, pipelines), made whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["assembled_by", "gathered", "is_divided", "is_dtensor", "whole"]

assembled_by: WeakKeyDictionary[Any, Callable[[], None]] = WeakKeyDictionary()
"""By a module that holds some of its model's layers only, or values that ZeRO has not taken over yet: what puts the
others into it, on all ranks together."""

gathered: dict[int, tuple[Tensor, Tensor]] = {}
"""By the identity of a tensor that a launch's ranks made whole: itself, and what is sent in its place."""


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Whether it is one of FSDP2 or tensor parallelism. Without importing their module, which takes a second."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_divided(tensor: Any) -> bool:
    """Whether this rank holds a part of it only."""
    return hasattr(tensor, "ds_tensor") or is_dtensor(tensor)


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor | None:
    """The whole tensor on the CPU, detached; where ZeRO keeps a float32 copy of a parameter, that one.

    Called by all ranks together, in the same order; None for those that do not `keep` it.
    """
    full: Any = tensor
    if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_tensor"):
        full = _of_zero(tensor)
    elif is_divided(tensor):
        mesh = full.device_mesh
        # Offloaded parts lie where the group of the mesh has no collectives.
        full = (full if full.device.type == mesh.device_type else full.to(mesh.device_type)).full_tensor()
    if not keep:
        return None
    full = full.detach()
    return full.clone() if full.device.type == "cpu" else full.cpu()  # type: ignore[no-any-return]


def _of_zero(parameter: Any) -> Any:
    import deepspeed  # its `zero` is no module to import from
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is None and hasattr(parameter, "ds_tensor"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter if full is None else full
