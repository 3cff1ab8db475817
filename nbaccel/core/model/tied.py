"""Parameters that are one tensor under several names: counted, saved and updated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nbaccel.whole import is_dtensor

__all__ = ["find_tied_parameters", "num_parameters", "retie_parameters", "same_memory"]


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one, as the model lists them; [] when there are none."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied: Sequence[Sequence[str]]) -> None:
    """Makes each group of names one parameter again, as `find_tied_parameters` had found them.

    The first name that has real memory decides the values; the others may be on the meta device, or
    copies that a move or a conversion has made.

    Raises:
        KeyError: the model has no parameter of that name.
        ValueError: the parameters of a group have different shapes.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    for group in tied:
        missing = [name for name in group if name not in present]
        if missing:
            raise KeyError(f"the model has no parameter named {', '.join(missing)}; it cannot be tied again")
        kept = next((n for n in group if present[n].device.type != "meta"), group[0])
        for name in group:
            if present[name].shape != present[kept].shape:
                raise ValueError(
                    f"{kept} has shape {tuple(present[kept].shape)} and {name} {tuple(present[name].shape)}; "
                    "parameters of different shapes cannot be one"
                )
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, present[kept])


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Elements in the model's parameters, tied ones counted once; with `trainable`, only those that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def same_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The names whose tensor is the very memory of an earlier one, each with that earlier name."""
    first: dict[int, list[str]] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        address = _local(tensor).data_ptr()
        if address == 0:  # nothing in it, or on the meta device
            continue
        seen = first.setdefault(address, [])
        kept = next((other for other in seen if _congruent(tensor, tensors[other])), None)
        if kept is None:
            seen.append(name)
        else:
            aliases[name] = kept
    return aliases


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _congruent(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that begin at the same address of one device are the same all through."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    a, b = _local(a), _local(b)
    return a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0
