"""Parts of stage 3 that live in files between uses: brought into memory, changed, and written back.

A sub-group's float32 parameters, moments and gradients, and a parameter's own part, are empty tensors while they
are on the disk. The names used here are DeepSpeed's own and private; its version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["gradients_in_memory", "is_on_disk", "rewrite", "state_in_memory"]


def _is_swapped(zero: Any, sub_group: int) -> bool:
    """Whether a sub-group is large enough to be swapped, and swapping was asked for."""
    asked = getattr(zero, "_swappable_optimizer_subgroup", None)  # stage 3 has it
    return asked is not None and bool(asked(sub_group))


@contextmanager
def state_in_memory(zero: Any, sub_group: int) -> Iterator[None]:
    """Parameters and moments of a sub-group are there inside, and are kept as they were left."""
    swapped = _is_swapped(zero, sub_group)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if swapped:
        zero._optimizer_states_and_gradient_swap_out(sub_group)


@contextmanager
def gradients_in_memory(zero: Any, sub_group: int) -> Iterator[None]:
    """The same of its gradients, between backward and the step."""
    swapped = _is_swapped(zero, sub_group)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if swapped:
        zero._writeback_swap_state(sub_group, write_opt_state=False, write_gradients=True)


def is_on_disk(parameter: Any) -> bool:
    """Whether this rank's part of a parameter is in a file now, and not in memory."""
    return bool(parameter.ds_tensor.status.name == "NOT_AVAILABLE")


def rewrite(parameter: nn.Parameter, part: Tensor) -> None:
    """Puts another part into the parameter's file."""
    held: Any = parameter
    held.nvme_swapper.get_buffer(held, part.numel()).copy_(part)
    held.nvme_swapper.swap_out_and_release([held])
