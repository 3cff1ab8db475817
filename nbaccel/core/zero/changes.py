"""Parameters that a loop changes in place between two steps: weights that are clipped, layers begun anew, averages.

ZeRO steps a float32 copy and writes it over the parameters, so that such a change would be gone with the next step. In
stages 1 and 2 it is taken over into the copy, as it is in stage 3 where DeepSpeed's `GatheredParameters` was used.
Without it there is nothing to change in stage 3 but an empty tensor, and that is refused. The names used here are
DeepSpeed's own and private; its version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbaccel.core.zero.flat import flats
from nbaccel.errors import ConfigError

__all__ = ["Changes"]

_CHUNK = 2**24
"""Numbers that are compared at once: what is held beside parameters while they are."""
_LOOKS = 3
"""Before how many steps the small parameters that stage 3 keeps whole are compared: who changes them does so soon."""


@final
class Changes:
    """Looks for them before a step, and before parameters are read.

    Args:
        zero: DeepSpeed's optimizer.
        module: the user's.
    """

    def __init__(self, zero: Any, module: nn.Module) -> None:
        self._zero = zero
        self._sharded: dict[str, Any] = {
            name: parameter
            for name, parameter in module.named_parameters()
            if hasattr(parameter, "ds_tensor")
        }
        self._versions: dict[str, tuple[int, int]] = {}
        self._whole: dict[str, Tensor] = {}
        """The small ones, as the last step left them."""
        self._steps = 0
        self.note()

    def stepped(self) -> None:
        """A step was made."""
        self._steps += 1
        self.note()

    def note(self) -> None:
        """What the parameters hold is what was meant: after a step, or after loading."""
        self._versions = {name: _versions(parameter) for name, parameter in self._sharded.items()}
        self._whole = {
            name: parameter.detach().clone()
            for name, parameter in self._sharded.items()
            if self._steps < _LOOKS and parameter.ds_persist and parameter.numel()
        }

    @torch.no_grad()
    def take_over(self) -> None:
        """Lets the float32 copies follow the parameters; no other rank is needed for it.

        Raises:
            ConfigError: stage 3, and a parameter was changed without being gathered.
        """
        for name, parameter in self._sharded.items():
            if self._is_lost(name, parameter):
                raise ConfigError(
                    f"{name} was changed in place on rank {dist.get_rank()}, and under stage 3 of ZeRO that is lost: "
                    "the rank holds a part of it elsewhere. Change it inside `with deepspeed.zero.GatheredParameters("
                    "parameters, modifier_rank=0):`, or use stage 2"
                )
        for copy, narrow in self._pairs():
            for own, seen in zip(torch.split(copy, _CHUNK), torch.split(narrow, _CHUNK), strict=True):
                seen = seen.to(own.device)
                if own.dtype == seen.dtype and torch.equal(own, seen):
                    continue  # found without memory for an answer
                same = own.to(seen.dtype) == seen
                if not same.all():
                    own.copy_(torch.where(same, own, seen))

    def _is_lost(self, name: str, parameter: Any) -> bool:
        if parameter.ds_status.name == "NOT_AVAILABLE" and parameter.numel():
            return True  # it was given other memory
        version, of_part = _versions(parameter)
        before, of_part_before = self._versions[name]
        if of_part != of_part_before:
            return False  # gathered, changed and divided again
        whole = self._whole.get(name)
        if version != before or whole is None or not parameter.numel():
            return bool(version != before)
        return not torch.allclose(parameter.data, whole, rtol=0.0, atol=0.0, equal_nan=True)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's float32 copy of each group, and the part of the parameters it is written to."""
        if self._sharded:
            narrow = self._zero.fp16_partitioned_groups_flat
            copies = self._zero.fp32_partitioned_groups_flat
            for copy, part in zip(copies, narrow, strict=True):
                # one tensor in float32; and what is on the disk cannot have been changed
                if part is not None and copy.numel() == part.numel() and copy.data_ptr() != part.data_ptr():
                    yield copy, part
            return
        for number, flat in enumerate(flats(self._zero)):
            _bring_back(self._zero, number)
            yield flat.tensor, self._zero.parallel_partitioned_bit16_groups[number][dist.get_rank()]


def _versions(parameter: Any) -> tuple[int, int]:
    """How often the parameter, and this rank's part of it, were changed in place; not through `.data`."""
    return parameter._version, parameter.ds_tensor._version


def _bring_back(zero: Any, number: int) -> None:
    """Parameters that were given other memory (`parameter.data = average`) go back into that of their group."""
    memory = zero.bit16_groups_flat[number]
    start, end = memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()
    strays = [p for p in zero.round_robin_bit16_groups[number] if not start <= p.data_ptr() < end]
    if not strays:
        return
    offsets = zero.round_robin_bit16_offsets[number]
    for parameter, offset in zip(zero.round_robin_bit16_groups[number], offsets, strict=True):
        if any(parameter is one for one in strays):
            memory.narrow(0, offset, parameter.numel()).copy_(parameter.data.flatten())
    zero._update_model_bit16_weights(number)
