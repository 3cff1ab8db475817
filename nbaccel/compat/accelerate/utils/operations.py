"""Collectives on nested structures of tensors, and what walks through such structures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from nbaccel.core.comm import collectives
from nbaccel.core.nested import leaves, map_leaves, map_tensors
from nbaccel.core.world import join
from nbaccel.errors import CollectiveMismatch

__all__ = [
    "DistributedOperationException",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "honor_type",
    "is_namedtuple",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "recursively_apply",
    "reduce",
    "reduction_of",
    "send_to_device",
    "slice_tensors",
]

DistributedOperationException = CollectiveMismatch


def gather(tensor: Any) -> Any:
    """Every rank's tensors, concatenated along dimension 0."""
    return collectives.gather(tensor, world=join())


def gather_object(object: Any) -> Any:
    """Every rank's list, as one list; without ranks what was given."""
    world = join()
    if world.size == 1:
        return object
    return [one for part in collectives.gather_object(object, world=world) for one in part]


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """One rank's tensors on every rank."""
    return collectives.broadcast(tensor, world=join(), source=from_process)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """One rank's objects in every rank's list."""
    return collectives.broadcast_object_list(object_list, world=join(), source=from_process)


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """The mean, sum, max or min over the ranks, times `scale`; "none" is the sum, as in accelerate."""
    return collectives.reduce(tensor, world=join(), reduction=reduction_of(reduction), scale=scale)


def reduction_of(name: str) -> Any:
    """nbaccel's word for accelerate's: there "none" adds up and does not divide."""
    return "sum" if name == "none" else name


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Tensors padded along `dim` to the longest of all ranks."""
    return collectives.pad_across_processes(
        tensor, world=join(), dim=dim, pad_index=pad_index, pad_first=pad_first
    )


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """The one rank's tensor on every rank; the others give None."""
    world = join()
    brought = collectives.gather_object(None if tensor is None else tensor.cpu(), world=world)
    found: torch.Tensor = next(one for one in brought if one is not None)
    return found.to(world.device)


def is_torch_tensor(tensor: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(tensor, torch.Tensor)


def is_namedtuple(data: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """What `generator` gives, as a list or tuple of the type of `obj`."""
    return type(obj)(*generator) if is_namedtuple(obj) else type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """A copy of `data` with `func(leaf, *args, **kwargs)` for every leaf that `test_type` takes.

    Raises:
        TypeError: another leaf, with `error_on_other_type`.
    """

    def apply(leaf: Any) -> Any:
        if test_type(leaf):
            return func(leaf, *args, **kwargs)
        if error_on_other_type:
            raise TypeError(f"a {type(leaf).__name__} is neither what is wanted nor a container of it")
        return leaf

    return map_leaves(apply, data)


def send_to_device(
    tensor: Any, device: Any, non_blocking: bool = False, skip_keys: str | Sequence[str] | None = None
) -> Any:
    """Everything in `tensor` that has `.to`, on `device`; what stands under `skip_keys` stays where it is."""
    skipped = {skip_keys} if isinstance(skip_keys, str) else set(skip_keys or ())
    if isinstance(tensor, Mapping):
        moved: Any = copy.copy(tensor)
        for key in [key for key in tensor if key not in skipped]:
            moved[key] = send_to_device(tensor[key], device, non_blocking, skip_keys)
        return moved
    if isinstance(tensor, (list, tuple)):
        return honor_type(tensor, [send_to_device(one, device, non_blocking, skip_keys) for one in tensor])
    return tensor.to(device, non_blocking=non_blocking) if callable(getattr(tensor, "to", None)) else tensor


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: Any = None, num_processes: Any = None
) -> Any:
    """Every tensor cut by `tensor_slice`."""
    return map_tensors(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: Sequence[Any], dim: int = 0) -> Any:
    """Structures of tensors that are alike, put together tensor by tensor.

    Raises:
        TypeError: something else than tensors is to be put together.
    """
    columns = [[leaf for _, leaf in leaves(one)] for one in data]
    if len(data) > 1 and not all(is_torch_tensor(leaf) for column in columns for leaf in column):
        raise TypeError("only tensors can be concatenated")
    parts = iter(zip(*columns, strict=True))
    return map_leaves(lambda _: _joined(next(parts), dim), data[0])


def _joined(parts: tuple[Any, ...], dim: int) -> Any:
    return torch.cat(parts, dim=dim) if is_torch_tensor(parts[0]) else parts[0]


def find_batch_size(data: Any) -> int | None:
    """The first dimension of the first tensor in `data`; None if there is no tensor.

    Raises:
        TypeError: it is 0-d.
    """
    first = next((leaf for _, leaf in leaves(data) if is_torch_tensor(leaf)), None)
    if first is not None and first.ndim == 0:
        raise TypeError("the first tensor has no dimension, so no batch size")
    return None if first is None else len(first)


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor in `data`."""
    return next((leaf.device for _, leaf in leaves(data) if is_torch_tensor(leaf)), None)


def listify(data: Any) -> Any:
    """Every tensor as nested lists of numbers."""
    return map_tensors(lambda tensor: tensor.detach().cpu().tolist(), data)


def convert_to_fp32(tensor: Any) -> Any:
    """Every float16 and bfloat16 tensor as float32."""
    half = (torch.float16, torch.bfloat16)
    return map_tensors(lambda one: one.float() if one.dtype in half else one, tensor)


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """`model_forward` whose results are float32."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(model_forward(*args, **kwargs))

    return forward
