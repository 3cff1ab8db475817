"""A checkpoint of a Hugging Face model by the names its class has today, as `from_pretrained` would load it.

Which names are renamed, and which tensors are made of others, is known to transformers alone: since version 5 its
`conversion_mapping`, before that the model's class. Nothing is guessed beyond that.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import nn

from nbaccel.core.offload.weights import ReadByCall, Stored
from nbaccel.errors import CheckpointError

__all__ = ["Renamed", "as_transformers"]

_BEFORE_5 = {
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"\.weight_g$": ".parametrizations.weight.original0",
    r"\.weight_v$": ".parametrizations.weight.original1",
}
"""What version 4 renames in every model: `_fix_state_dict_key_on_load` in its modeling_utils.py."""

_COMPUTED = {"inv_freq", "position_ids"}
"""Buffers that old checkpoints hold and models compute today."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A checkpoint by a model's names."""

    stored: Mapping[str, Stored]
    applied: Mapping[str, int] = field(default_factory=dict)
    """What was renamed or converted, and how many tensors each concerned."""

    def __str__(self) -> str:
        return "; ".join(f"{what} ({count} tensors)" for what, count in self.applied.items())


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


_Source = tuple[str, str, Stored]
"""A tensor that others are made of: its name in the checkpoint, the pattern that was found, and where it is."""


def as_transformers(model: nn.Module, stored: Mapping[str, Stored]) -> Renamed:
    """The tensors of a checkpoint as `from_pretrained` would give them to `model`; of any other model as they are.

    What is made of several tensors of the checkpoint, as the experts of a Mixtral, is converted when it is read.

    Raises:
        CheckpointError: two tensors would get one name, or cannot be converted.
    """
    known = sys.modules.get("transformers.modeling_utils")
    if known is None or not isinstance(model, known.PreTrainedModel):
        return Renamed(stored=stored)
    names = model.state_dict().keys()
    renamings, converters = _rules(model)
    prefix = str(model.base_model_prefix)
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    groups: dict[str, tuple[Any, list[_Source]]] = {}
    applied: Counter[str] = Counter()
    for key in sorted(stored, key=_natural):  # experts are stacked in the order of their numbers
        name, said = _renamed(key, renamings)
        converted, converter, pattern = _converted(name, converters)
        final_name, moved = _with_prefix(converted, prefix, names)
        if final_name not in names:
            converter, said = None, []
            final_name, moved = _with_prefix(key, prefix, names)
        applied.update([*said, *([moved] if moved else [])])
        if converter is not None and pattern is not None:
            groups.setdefault(final_name, (converter, []))[1].append((key, pattern, stored[key]))
            continue
        if final_name in found:
            raise CheckpointError(
                f"{origin[final_name]} and {key} are both {final_name} in this {type(model).__name__}"
            )
        found[final_name], origin[final_name] = stored[key], key
    for name, (converter, sources) in groups.items():
        found |= _made_of(name, converter, sources, model)
        text = f"{', '.join(converter.source_patterns)} made into {', '.join(converter.target_patterns)}"
        applied[text] += len(sources)
    ignored = _ignored(model)
    kept = {name: one for name, one in found.items() if name in names or not ignored(name)}
    return Renamed(stored=kept, applied=applied)


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


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _made_of(name: str, converter: Any, sources: Sequence[_Source], model: nn.Module) -> dict[str, Stored]:
    """What a conversion makes, by name: shapes are found out on tensors without values."""
    empty = [torch.empty(one.shape, dtype=one.dtype, device="meta") for _, _, one in sources]
    made: dict[str, Stored] = {}
    for target, like in _convert(name, converter, sources, empty, model).items():
        read = partial(_read, name, converter, sources, model, target)
        made[target] = ReadByCall(like.dtype, tuple(like.shape), read)
    return made


def _read(
    name: str, converter: Any, sources: Sequence[_Source], model: nn.Module, target: str
) -> torch.Tensor:
    views = [one.view() for _, _, one in sources]
    values = [one.read() if view is None else view for (_, _, one), view in zip(sources, views, strict=True)]
    return _convert(name, converter, sources, values, model)[target].contiguous()


@torch.no_grad()
def _convert(
    name: str, converter: Any, sources: Sequence[_Source], values: Sequence[torch.Tensor], model: Any
) -> dict[str, torch.Tensor]:
    fresh = copy.deepcopy(converter)  # it keeps what it is given
    for (key, pattern, _), value in zip(sources, values, strict=True):
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
