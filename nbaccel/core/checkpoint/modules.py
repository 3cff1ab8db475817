"""Models and optimizers as flat state under canonical names: the names the bare model gives its parameters.

The names are those of torch.distributed.checkpoint.state_dict (a test compares them). Its functions are
not used for optimizers because `get_optimizer_state_dict` makes a step with zero gradients when there is
no state yet, which moves Adam's step counter, and because `set_*` keeps the tensors it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbaccel.core.checkpoint.contents import Entries, Saved
from nbaccel.core.model.composed import is_composed, parts_of
from nbaccel.errors import CheckpointError

__all__ = ["ModelState", "OptimizerState", "canonical_name", "differences"]

_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes under which torch's compiler and activation checkpointing keep the module they wrap."""
_EXTRA = "_extra_state"
_LISTED = 6


def canonical_name(model: nn.Module, name: str) -> str:
    """`name` of a parameter or buffer of `model` as it would be without wrappers."""
    if "module" not in name and not any(part in name for part in _TRANSPARENT):
        return name
    parts, current = [], model
    for part in name.split("."):
        if not (part in _TRANSPARENT or (part == "module" and isinstance(current, DistributedDataParallel))):
            parts.append(part)
        current = getattr(current, part, current)
    return ".".join(parts)


def differences(wanted: Iterable[str], saved: Iterable[str]) -> str:
    """The names that are on one side only, in words; empty when there are none."""
    ours, theirs = set(wanted), set(saved)
    said = []
    for what, names in (
        ("missing in the checkpoint", ours - theirs),
        ("only in the checkpoint", theirs - ours),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            said.append(f"{what}: {shown}{more}")
    return "; ".join(said)


@final
class ModelState:
    """A model's parameters and persistent buffers, wrapped or not. Buffers are saved as rank 0 has them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _state(self) -> dict[str, Any]:
        """By canonical name; of tensors made of others, as quantised weights are, each part."""
        state: dict[str, Any] = {}
        for name, value in self._model.state_dict().items():
            name = canonical_name(self._model, name)
            if isinstance(value, torch.Tensor) and is_composed(value):
                state.update((f"{name}.{part}", tensor) for part, tensor in parts_of(value))
            else:
                state[name] = value
        return state

    def entries(self) -> Entries:
        state = self._state()
        tensors, plain = _split(state)
        named = self._model.named_parameters(remove_duplicate=False)
        parameters = {canonical_name(self._model, name) for name, _ in named}
        return Entries(tensors=tensors, plain=plain, of_rank_zero=tensors.keys() - parameters)

    def targets(self, saved: Saved) -> dict[str, torch.Tensor]:
        tensors, plain = _split(self._state())
        found = differences([*tensors, *plain], [*saved.shapes, *saved.plain])
        if found:
            raise CheckpointError(f"this is another model's checkpoint: {found}")
        wrong = [
            f"{name} is {tuple(saved.shapes.get(name, ()))} in the checkpoint and {tuple(tensor.shape)} in the model"
            for name, tensor in tensors.items()
            if saved.shapes.get(name) != tensor.shape
        ]
        if wrong:
            more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise CheckpointError(f"this is another model's checkpoint: {'; '.join(wrong[:_LISTED])}{more}")
        return tensors

    def finish(self, tensors: Mapping[str, torch.Tensor], saved: Saved) -> None:
        # The tensors are mostly the model's own, filled in place; a module with its own way of loading
        # (state hooks, extra state) still gets its say.
        own = {canonical_name(self._model, name): name for name in self._model.state_dict()}
        merged = {**saved.plain, **tensors}
        # parts of composed tensors are filled, and no entries of the model's
        given = {own[name]: value for name, value in merged.items() if name in own}
        self._model.load_state_dict(given, strict=len(given) == len(merged))


def _split(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and the rest. Extra state may change its size from save to load, so it never is a tensor."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not _is_extra(k)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def _is_extra(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == _EXTRA


@final
class OptimizerState:
    """An optimizer's state, by the names its parameters have in `models`.

    With several models the names begin with the model's number; a parameter of none of them is named by
    its place in the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, models: Sequence[nn.Module]) -> None:
        self._optimizer, self._models = optimizer, tuple(models)

    def _names(self) -> list[list[str]]:
        """The name of each parameter of each group."""
        known: dict[torch.Tensor, str] = {}
        for number, model in enumerate(self._models):
            prefix = f"{number}." if len(self._models) > 1 else ""
            for name, parameter in model.named_parameters():
                known.setdefault(parameter, prefix + canonical_name(model, name))
        return [
            [known.get(p, f"unnamed.{g}.{i}") for i, p in enumerate(group["params"])]
            for g, group in enumerate(self._optimizer.param_groups)
        ]

    def entries(self) -> Entries:
        packed = self._optimizer.state_dict()
        names = self._names()
        by_number = {
            number: name
            for group, group_names in zip(packed["param_groups"], names, strict=True)
            for number, name in zip(group["params"], group_names, strict=True)
        }
        tensors: dict[str, torch.Tensor] = {}
        keys: dict[str, list[str]] = {}
        rest: dict[str, Any] = {}
        other: dict[Any, Any] = {}
        for number, state in packed["state"].items():
            if number not in by_number:
                other[number] = state
                continue
            name = by_number[number]
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[_entry(name, key)] = value
                    keys.setdefault(name, []).append(key)
                else:
                    rest.setdefault(name, {})[key] = value
        groups = [{**group, "params": n} for group, n in zip(packed["param_groups"], names, strict=True)]
        return Entries(tensors=tensors, plain={"groups": groups, "keys": keys, "rest": rest, "other": other})

    def targets(self, saved: Saved) -> dict[str, torch.Tensor]:
        names = self._names()
        groups = saved.plain["groups"]
        found = differences(
            (n for group in names for n in group), (n for group in groups for n in group["params"])
        )
        if found:
            raise CheckpointError(f"this is another model's optimizer: {found}")
        if [set(group) for group in names] != [set(group["params"]) for group in groups]:
            raise CheckpointError(
                f"the optimizer has {len(names)} parameter group(s) and the saved one {len(groups)}, or they "
                "divide the parameters otherwise; build it as it was when it was saved"
            )
        targets: dict[str, torch.Tensor] = {}
        for group, group_names in zip(self._optimizer.param_groups, names, strict=True):
            for parameter, name in zip(group["params"], group_names, strict=True):
                for key in saved.plain["keys"].get(name, ()):
                    entry = _entry(name, key)
                    current = self._optimizer.state.get(parameter, {}).get(key)
                    targets[entry] = _target(current, parameter, saved.shapes[entry], saved.dtypes[entry])
        return targets

    def finish(self, tensors: Mapping[str, torch.Tensor], saved: Saved) -> None:
        plain = saved.plain
        state: dict[Any, Any] = dict(plain["other"])
        groups: list[dict[str, Any]] = []
        number = 0
        for group, group_names in zip(plain["groups"], self._names(), strict=True):
            numbers = range(number, number + len(group_names))
            number += len(group_names)
            groups.append({**group, "params": list(numbers)})
            for i, name in zip(numbers, group_names, strict=True):
                values = {key: tensors[_entry(name, key)] for key in plain["keys"].get(name, ())}
                values.update(plain["rest"].get(name, {}))
                if values:
                    state[i] = values
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _entry(name: str, key: str) -> str:
    return f"state.{name}.{key}"


def _target(current: Any, parameter: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Where to read one state tensor to: its present self, else one laid out as its parameter is."""
    if isinstance(current, torch.Tensor) and current.shape == shape and current.dtype == dtype:
        return current
    if shape and shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
