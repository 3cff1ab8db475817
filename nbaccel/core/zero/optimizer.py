"""The optimizer that ZeRO steps, by the names of the user's model, so that its state moves to and from every strategy.

Written are whole tensors; read are this rank's parts of them. A flat tensor has one count of steps for all parameters
in it: where a checkpoint has several, that is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbaccel.core.checkpoint import Entries, Saved
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.zero.flat import flats, whole_shape, write_part
from nbaccel.core.zero.swapping import state_in_memory
from nbaccel.errors import CheckpointError

__all__ = ["ZeroOptimizerState"]

_State = Mapping[str, Tensor]

_FRESH = {"step": 0.0, "mu_product": 1.0}
"""What torch's optimizers begin with, where it is one number for a parameter."""
_SHOWN = 3
"""Names in a message."""


@final
class ZeroOptimizerState:
    """A torch optimizer that ZeRO steps.

    Args:
        zero: DeepSpeed's optimizer, around the user's.
        groups: the parameters of each of the user's groups, by name.
    """

    def __init__(self, zero: Any, groups: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self._zero, self._groups = zero, groups
        self._named = {name: parameter for named in groups for name, parameter in named.items()}

    def entries(self) -> Entries:
        tensors: dict[str, Tensor] = {}
        keys: dict[str, list[str]] = {}
        for flat, names in self._flats():
            shared, long = _divided(self._zero.optimizer.state.get(flat, {}), flat)
            for name in names:
                own = {key: value.detach().cpu().clone() for key, value in shared.items()}
                own |= {key: _whole(self._named[name], key) for key in long}
                tensors |= {f"state.{name}.{key}": value for key, value in own.items()}
                keys[name] = list(own)
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": list(named)}
            for group, named in zip(self._zero.optimizer.param_groups, self._groups, strict=True)
        ]
        return Entries(tensors=tensors, plain={"groups": groups, "keys": keys, "rest": {}, "other": {}})

    def _flats(self) -> list[tuple[Tensor, list[str]]]:
        """Each flat tensor with the names of the parameters in it."""
        names = {id(parameter): name for name, parameter in self._named.items()}
        return [
            (flat.tensor, [names[id(p)] for p in flat.parameters if id(p) in names])
            for flat in flats(self._zero)
        ]

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        groups = saved.plain["groups"]
        found = differences(self._named, (name for group in groups for name in group["params"]))
        if found:
            raise CheckpointError(f"this is another model's optimizer: {found}")
        if [set(named) for named in self._groups] != [set(group["params"]) for group in groups]:
            raise CheckpointError(
                f"the optimizer has {len(self._groups)} parameter group(s) and the saved one {len(groups)}, or they "
                "divide the parameters otherwise; build it as it was when it was saved"
            )
        entries = (f"state.{n}.{key}" for n in self._named for key in saved.plain["keys"].get(n, ()))
        return {entry: torch.empty(saved.shapes[entry], dtype=saved.dtypes[entry]) for entry in entries}

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        zero, state = self._zero, self._zero.optimizer.state
        own = {name: _state_of(name, tensors, saved.plain) for name in self._named}
        numbers = {
            key
            for name, values in own.items()
            for key, value in values.items()
            if value.shape != whole_shape(self._named[name])
        }
        long = {key for values in own.values() for key in values} - numbers
        if not numbers | long:  # saved before any step: what there is begins again
            for flat, _ in self._flats():
                here = _divided(state.get(flat, {}), flat)
                numbers, long = numbers | here[0].keys(), long.union(here[1])
        shared = self._shared({n: {k: v for k, v in own[n].items() if k in numbers} for n in own}, numbers)
        for group, theirs in zip(zero.optimizer.param_groups, saved.plain["groups"], strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})
        if not numbers | long:
            return
        # DeepSpeed gives a flat tensor its state in the first step only; here it is needed before.
        for sub_group, ((flat, _), values) in enumerate(zip(self._flats(), shared, strict=True)):
            with state_in_memory(zero, sub_group):
                there = state.get(flat, {})
                state[flat] = {
                    **{key: value.clone() for key, value in values.items()},
                    **{key: there[key] if key in there else torch.zeros_like(flat) for key in long},
                }
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named.items():
            for key in long:
                value = own[name].get(key)
                write_part(parameter, torch.zeros(whole_shape(parameter)) if value is None else value, key)

    def _shared(self, own: Mapping[str, _State], keys: Collection[str]) -> list[_State]:
        """What each flat tensor has one number of, as its count of steps: that of the parameter with the fewest steps.

        Adam corrects its moments by the count: too low, updates are too small for a while; too high, too large.

        Raises:
            CheckpointError: there is none of any parameter in it, and no knowing what the optimizer begins with.
        """
        found: list[_State] = []
        several: dict[str, int] = {}
        fresh = {key: torch.tensor(_FRESH[key]) for key in keys if key in _FRESH}
        for _, names in self._flats():
            states = {name: own[name] or fresh for name in names if own[name] or fresh.keys() == keys}
            if names and not states:
                raise CheckpointError(
                    f"the checkpoint has no optimizer state of {', '.join(names[:_SHOWN])}, which did not learn, "
                    f"perhaps, and what others' begins with ({', '.join(sorted(keys))}) is not known; load it under "
                    "strategy 'ddp' or 'fsdp'"
                )
            steps = {name: int(state["step"]) for name, state in states.items() if "step" in state}
            several |= steps if len(set(steps.values())) > 1 else {}
            found.append(min(states.values(), key=lambda state: float(state.get("step", 0)), default=fresh))
        if several and dist.get_rank() == 0:
            warnings.warn(_about(several), stacklevel=2)
        return found


def _whole(parameter: nn.Parameter, key: str) -> Tensor:
    """A parameter's moment on the CPU. Called by all ranks together."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found: Tensor = safe_get_full_optimizer_state(parameter, key)
    return found.detach().cpu().clone()


def _divided(state: Mapping[str, Any], flat: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a flat tensor: its numbers, and the keys of what is as long as it."""
    long = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    numbers = {key: torch.as_tensor(value) for key, value in state.items() if key not in long}
    return numbers, sorted(long)


def _state_of(name: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> _State:
    """A parameter's state in a checkpoint; numbers that an optimizer keeps as Python's are tensors here."""
    numbers = {k: v for k, v in plain["rest"].get(name, {}).items() if isinstance(v, (int, float))}
    found = {key: torch.tensor(float(value)) for key, value in numbers.items()}
    return found | {key: tensors[f"state.{name}.{key}"] for key in plain["keys"].get(name, ())}


def _about(steps: Mapping[str, int]) -> str:
    """What is lost of the steps that parameters of one flat tensor have made."""
    said = []
    for number in (min(steps.values()), max(steps.values())):
        names = [name for name, made in steps.items() if made == number]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        said.append(f"{number} ({', '.join(names[:_SHOWN])}{more})")
    return (
        f"in the checkpoint some parameters have made fewer optimizer steps than others: from {' to '.join(said)}. "
        "ZeRO has one count for a whole group of the optimizer and goes on with the fewest, so that the next updates "
        "of the others are smaller than they would be: Adam's by up to 7 times, for about 1 / (1 - beta2) steps. "
        "Strategies 'ddp' and 'fsdp' keep every parameter's own count; ZeRO keeps that of each group"
    )
