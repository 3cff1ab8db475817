"""The state of a ZeRO engine by the names of the user's model, so that it moves to and from every strategy.

DeepSpeed keeps parameters and moments in flat float32 tensors, of which a rank has its part: one tensor per
parameter group in stages 1 and 2, one per sub-group in stage 3. Written are whole tensors; read are this
rank's parts of them. Whole tensors are on the CPU of every rank while a checkpoint is written or read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbaccel.core.checkpoint import Entries, Saved
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.load_model import find_weights, tied_names
from nbaccel.core.zero.gradients import flats
from nbaccel.core.zero.swapping import is_on_disk, rewrite, state_in_memory
from nbaccel.errors import CheckpointError

__all__ = [
    "ZeroModelState",
    "ZeroOptimizerState",
    "load_weights",
    "part_of",
    "whole_state_dict",
    "write_part",
]


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """The whole parameter on the CPU, in float32 where there is such a copy. Called by all ranks together."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        return full.detach().cpu().clone()  # type: ignore[no-any-return]
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu().clone()


def whole_state_dict(module: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The module's state dict with whole tensors, tied ones the same object. Called by all ranks together."""
    full: dict[int, Tensor] = {}
    found: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            if id(value) not in full:
                full[id(value)] = whole_parameter(value)
                if not keep:
                    full[id(value)] = torch.empty(0)
            found[name] = full[id(value)]
        else:
            found[name] = value.detach().clone() if isinstance(value, Tensor) else value
    return found if keep else {}


@torch.no_grad()
def load_weights(module: nn.Module, folder: str | Path, *, strict: bool) -> None:
    """Fills the engine's module from safetensors files, one tensor after another. See `load_model`."""
    state = module.state_dict(keep_vars=True)
    shapes = {name: _shape(value) for name, value in state.items() if isinstance(value, Tensor)}
    found = find_weights(shapes, tied_names(module), folder, strict=strict)
    for name in found.names:
        value = torch.empty(shapes[name], dtype=found.dtype(name))
        found.read({name: value})
        _write(state[name], value)


@final
class ZeroModelState:
    """A module whose parameters a ZeRO optimizer holds."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def entries(self) -> Entries:
        state = whole_state_dict(self._module)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        named = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        return Entries(
            tensors=tensors,
            plain={name: value for name, value in state.items() if name not in tensors},
            of_rank_zero=tensors.keys() - named,
        )

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        state = self._module.state_dict(keep_vars=True)
        found = differences(state, [*saved.shapes, *saved.plain])
        if found:
            raise CheckpointError(f"this is another model's checkpoint: {found}")
        shapes = {name: _shape(value) for name, value in state.items() if isinstance(value, Tensor)}
        wrong = [name for name, shape in shapes.items() if saved.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"this is another model's checkpoint: {wrong[0]} is {tuple(saved.shapes[wrong[0]])} there and "
                f"{tuple(shapes[wrong[0]])} in the model"
            )
        return {name: torch.empty(shape, dtype=saved.dtypes[name]) for name, shape in shapes.items()}

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        state = self._module.state_dict(keep_vars=True)
        for name, value in tensors.items():
            _write(state[name], value)


@final
class ZeroOptimizerState:
    """A torch optimizer that ZeRO steps.

    Args:
        zero: DeepSpeed's optimizer, around the user's.
        parameters: those of each of the user's groups, by name.
    """

    def __init__(self, zero: Any, parameters: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self._zero, self._parameters = zero, parameters

    def entries(self) -> Entries:
        tensors: dict[str, Tensor] = {}
        keys: dict[str, list[str]] = {}
        state = self._zero.optimizer.state
        shared = {key: value for flat in flats(self._zero) for key, value in _shared(state.get(flat), flat)}
        long = sorted({key for flat in flats(self._zero) for key, _ in _long(state.get(flat), flat)})
        for name, parameter in self._named():
            for key in long:
                tensors[f"state.{name}.{key}"] = self._whole(parameter, key)
            for key, value in shared.items():
                tensors[f"state.{name}.{key}"] = value.detach().cpu().clone()
            keys[name] = [*shared, *long]
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": list(named)}
            for group, named in zip(self._zero.optimizer.param_groups, self._parameters, strict=True)
        ]
        return Entries(tensors=tensors, plain={"groups": groups, "keys": keys, "rest": {}, "other": {}})

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self._parameters:
            yield from group.items()

    @staticmethod
    def _whole(parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        found = safe_get_full_optimizer_state(parameter, key)
        return found.detach().cpu().clone()  # type: ignore[no-any-return]

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        groups = saved.plain["groups"]
        ours = [set(named) for named in self._parameters]
        found = differences(
            (name for named in ours for name in named), (n for group in groups for n in group["params"])
        )
        if found:
            raise CheckpointError(f"this is another model's optimizer: {found}")
        if ours != [set(group["params"]) for group in groups]:
            raise CheckpointError(
                f"the optimizer has {len(ours)} parameter group(s) and the saved one {len(groups)}, or they divide "
                "the parameters otherwise; build it as it was when it was saved"
            )
        return {
            entry: torch.empty(saved.shapes[entry], dtype=saved.dtypes[entry])
            for name, _ in self._named()
            for entry in (f"state.{name}.{key}" for key in saved.plain["keys"].get(name, ()))
        }

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        zero = self._zero
        for group, theirs in zip(zero.optimizer.param_groups, saved.plain["groups"], strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})
        own: dict[str, dict[str, Tensor]] = {
            name: {key: tensors[f"state.{name}.{key}"] for key in saved.plain["keys"].get(name, ())}
            for name, _ in self._named()
        }
        parameters = dict(self._named())
        long = {
            key
            for name, values in own.items()
            for key, value in values.items()
            if value.shape == _shape(parameters[name])
        }
        shared = {key: value for values in own.values() for key, value in values.items() if key not in long}
        if not long and not shared:
            return
        # DeepSpeed gives a flat tensor its state in the first step only; here it is needed before.
        for sub_group, flat in enumerate(flats(zero)):
            with state_in_memory(zero, sub_group):
                there = zero.optimizer.state.get(flat, {})
                zero.optimizer.state[flat] = {
                    **{key: value.clone() for key, value in shared.items()},
                    **{key: there[key] if key in there else torch.zeros_like(flat) for key in long},
                }
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in parameters.items():
            for key in long & own[name].keys():
                write_part(parameter, own[name][key], key)


def _long(state: Mapping[str, Any] | None, flat: Tensor) -> list[tuple[str, Tensor]]:
    """State with a number for each parameter's."""
    return [(k, v) for k, v in (state or {}).items() if isinstance(v, Tensor) and v.shape == flat.shape]


def _shared(state: Mapping[str, Any] | None, flat: Tensor) -> list[tuple[str, Tensor]]:
    """State with one number for the whole flat tensor: the step."""
    return [
        (k, torch.as_tensor(v, dtype=torch.float32) if not isinstance(v, Tensor) else v)
        for k, v in (state or {}).items()
        if not (isinstance(v, Tensor) and v.shape == flat.shape)
    ]


def _shape(value: Tensor) -> torch.Size:
    shape: torch.Size = getattr(value, "ds_shape", value.shape)
    return shape


def _write(current: Tensor, value: Tensor) -> None:
    """A whole value into a parameter or a buffer."""
    if isinstance(current, nn.Parameter):
        write_parameter(current, value)
    else:
        current.copy_(value)


def write_parameter(parameter: Any, value: Tensor) -> None:
    """A whole value into a parameter, its float32 copy, and this rank's part of either."""
    if hasattr(parameter, "ds_tensor"):
        part = part_of(value, parameter.ds_tensor.ds_numel)
        if is_on_disk(parameter):
            rewrite(parameter, part)
        else:
            parameter.ds_tensor.copy_(part.to(parameter.ds_tensor))
        if parameter.numel() == parameter.ds_numel:  # small ones stay whole
            parameter.copy_(value.to(parameter))
    else:
        parameter.copy_(value.to(parameter))
    if parameter.requires_grad:
        write_part(parameter, value, None)


@torch.no_grad()
def write_part(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """A whole value, or this rank's part of it in stage 3, into a float32 copy (None) or optimizer state `key`."""
    held: Any = parameter
    if hasattr(held, "ds_tensor"):
        if held.requires_grad:
            count = held.ds_tensor.ds_numel
            part = value.float() if value.numel() == count else part_of(value.float(), count)
            _write_sharded(held, part, key)
        return
    mapping = getattr(held, "_hp_mapping", None)
    if mapping is not None:
        address = mapping.lp_fragment_address
        mapping.get_hp_fragment(key).copy_(value.flatten().narrow(0, address.start, address.numel))


def _write_sharded(parameter: Any, part: Tensor, key: str | None) -> None:
    # DeepSpeed's own setter asks for the size of a parameter that is on the disk, and takes that of its stand-in.
    zero = parameter._z3_optimizer
    sub_group, start, count = zero.grad_position[zero.get_param_id(parameter)]
    with state_in_memory(zero, sub_group):
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        whole = flat if key is None else zero.optimizer.state[flat][key]
        whole.narrow(0, start, count).copy_(part)


def part_of(value: Tensor, count: int) -> Tensor:
    """This rank's `count` numbers of a whole value, as ZeRO-3 divides it: the last part is filled with zeros."""
    start = count * dist.get_rank()
    part = value.flatten()[start : start + count]
    return nn.functional.pad(part, (0, count - part.numel())) if part.numel() < count else part
