"""A checkpoint of a Hugging Face model by the names its class has today, as `from_pretrained` would load it.

Which names are renamed, and which tensors are made of others, is known to transformers alone: since version 5 its
`conversion_mapping`, before that the model's class. Nothing is guessed beyond that.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import nn

from nbaccel.errors import CheckpointError
from nbaccel.numbered import numbered

__all__ = ["Made", "Renamed", "as_transformers"]

_BEFORE_5 = {
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"\.weight_g$": ".parametrizations.weight.original0",
    r"\.weight_v$": ".parametrizations.weight.original1",
}
"""What version 4 renames in every model: `_fix_state_dict_key_on_load` in its modeling_utils.py."""

_COMPUTED = {"inv_freq", "position_ids"}
"""Buffers that old checkpoints hold and models compute today."""


class Described(Protocol):
    """What is known of a tensor in a file."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A tensor that is made of several of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Their names there."""
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Given their values, in that order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A checkpoint by a model's names."""

    names: Mapping[str, str]
    """Those in the checkpoint."""
    made: Mapping[str, Made] = field(default_factory=dict)
    applied: Mapping[str, int] = field(default_factory=dict)
    """What was renamed or converted, and how many tensors each concerned."""

    def __str__(self) -> str:
        """What was done, in words; empty where nothing was."""
        told = "; ".join(f"{what} ({count} tensors)" for what, count in self.applied.items())
        return f"read as transformers reads it: {told}" if told else ""


class _Renaming(Protocol):
    """One of transformers' rules."""

    def rename_source_key(self, source_key: str, /) -> tuple[str, str | None]:
        """The new name, and the pattern that was found; None: it does not concern this name."""


@final
class _Pattern:
    """A rule of version 4."""

    def __init__(self, pattern: str, replacement: str) -> None:
        self._pattern, self._replacement = pattern, replacement

    def rename_source_key(self, source_key: str, /) -> tuple[str, str | None]:
        name, count = re.subn(self._pattern, self._replacement, source_key)
        return name, self._pattern if count else None


_Source = tuple[str, str]
"""A tensor that others are made of: its name in the checkpoint, and the pattern that was found."""


def as_transformers(model: nn.Module, names: Collection[str], stored: Mapping[str, Described]) -> Renamed:
    """The tensors of a checkpoint as `from_pretrained` would give them to `model`; of any other model as they are.

    What is made of several tensors of the checkpoint, as the experts of a Mixtral, is converted when it is read.

    Args:
        names: of the model's tensors.

    Raises:
        CheckpointError: two tensors would get one name, or cannot be converted.
    """
    known = sys.modules.get("transformers.modeling_utils")
    if known is None or not isinstance(model, known.PreTrainedModel):
        return Renamed(names={name: name for name in stored})
    renamings, converters = _rules(model)
    prefix = str(model.base_model_prefix)
    found: dict[str, str] = {}
    groups: dict[str, tuple[Any, list[_Source]]] = {}
    applied: Counter[str] = Counter()
    for key in sorted(stored, key=numbered):  # experts are stacked in the order of their numbers
        name, said = _renamed(key, renamings)
        converted, converter, pattern = _converted(name, converters)
        final_name, moved = _with_prefix(converted, prefix, names)
        if final_name not in names:
            converter, said = None, []
            final_name, moved = _with_prefix(key, prefix, names)
        applied.update([*said, *([moved] if moved else [])])
        if converter is not None and pattern is not None:
            groups.setdefault(final_name, (converter, []))[1].append((key, pattern))
            continue
        if final_name in found:
            raise CheckpointError(
                f"{found[final_name]} and {key} are both {final_name} in this {type(model).__name__}"
            )
        found[final_name] = key
    made: dict[str, Made] = {}
    for name, (converter, sources) in groups.items():
        made |= _made_of(name, converter, sources, model, stored)
        text = f"{', '.join(converter.source_patterns)} made into {', '.join(converter.target_patterns)}"
        applied[text] += len(sources)
    ignored = _ignored(model)
    kept = {name: key for name, key in found.items() if name in names or not ignored(name)}
    return Renamed(names=kept, made=made, applied=applied)


def _rules(model: Any) -> tuple[Sequence[_Renaming], Sequence[Any]]:
    """Renamings, all applied one after the other; and conversions, of which one is."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        rules = {**_BEFORE_5, **getattr(model, "_checkpoint_conversion_mapping", {})}
        return [_Pattern(pattern, new) for pattern, new in rules.items()], []
    every = get_model_conversion_mapping(model)
    converters = [rule for rule in every if isinstance(rule, WeightConverter)]
    return [rule for rule in every if not isinstance(rule, WeightConverter)], converters


def _renamed(key: str, renamings: Sequence[_Renaming]) -> tuple[str, list[str]]:
    name, said = key, []
    for rule in renamings:
        new, _ = rule.rename_source_key(name)
        if new != name:
            said.append(_difference(name, new))
            name = new
    return name, said


def _difference(old: str, new: str) -> str:
    """The parts of two names that differ, with the layers' numbers left out."""
    before, after = old.split("."), new.split(".")
    while len(before) > 1 and len(after) > 1 and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while len(before) > 1 and len(after) > 1 and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return f"{'.'.join(before)} renamed {'.'.join(after)}"


def _converted(name: str, converters: Sequence[Any]) -> tuple[str, Any, str | None]:
    for converter in converters:
        new, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return new, converter, pattern
    return name, None, None


def _with_prefix(name: str, prefix: str, names: Collection[str]) -> tuple[str, str | None]:
    """The model's own name with that of its base model, or without, where the model has that one."""
    start = f"{prefix}."
    if prefix and name.startswith(start) and name.removeprefix(start) in names:
        return name.removeprefix(start), f"{start} taken off"
    if prefix and start + name in names:
        return start + name, f"{start} put before"
    return name, None


def _made_of(
    name: str, converter: Any, sources: Sequence[_Source], model: nn.Module, stored: Mapping[str, Described]
) -> dict[str, Made]:
    """What a conversion makes, by name: shapes are found out on tensors without values."""
    keys = tuple(key for key, _ in sources)
    empty = [torch.empty(stored[key].shape, dtype=stored[key].dtype, device="meta") for key in keys]

    def make(target: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return _convert(name, converter, sources, values, model)[target].contiguous()

    return {
        target: Made(dtype=like.dtype, shape=tuple(like.shape), sources=keys, make=partial(make, target))
        for target, like in _convert(name, converter, sources, empty, model).items()
    }


@torch.no_grad()
def _convert(
    name: str, converter: Any, sources: Sequence[_Source], values: Sequence[torch.Tensor], model: Any
) -> dict[str, torch.Tensor]:
    fresh = copy.deepcopy(converter)  # it keeps what it is given
    for (key, pattern), value in zip(sources, values, strict=True):
        fresh.add_tensor(name, key, pattern, value)
    try:
        made = fresh.convert(name, model=model, config=model.config)
    except Exception as error:  # whatever a conversion of transformers does
        raise CheckpointError(
            f"{name} cannot be made of {sources[0][0]} and {len(sources) - 1} more as transformers does it: {error}"
        ) from error
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _ignored(model: Any) -> Any:
    """Whether `from_pretrained` passes over a tensor that the model does not have."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    ends = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    patterns |= {rf"(^|\.){end}$" for end in ends & _COMPUTED}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)) or r"(?!)").search
