"""A device map that the user wrote: the place of each part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from nbaccel.core.offload.parts import Part, listed
from nbaccel.errors import ConfigError

__all__ = ["places_given"]


def places_given(device_map: Mapping[str, str], parts: Sequence[Part], model: nn.Module) -> list[str]:
    """The place of each part, by the nearest name at or above it in the map.

    Raises:
        ConfigError: a part has no place or several, or the map names what the model does not have.
    """
    places: list[str] = []
    without: list[str] = []
    for part in parts:
        entries = {key: _nearest(key, device_map) for key in part.keys}
        without += [key or "the model" for key, entry in entries.items() if entry is None]
        given = {device_map[entry] for entry in entries.values() if entry is not None}
        if len(given) > 1:
            raise ConfigError(
                f"the tensors that {part.name or 'the model'} has of its own lie in one place, not in {given}"
            )
        places.extend(given or {""})
    odd = set(device_map) - {key for part in parts for key in _at_and_above(part)} - {""}
    wrong = odd - {name for name, _ in model.named_modules(remove_duplicate=False)} if odd else set()
    whole = {part.name for part in parts if not part.own}
    for name in sorted(odd):
        above = _above(name, whole)
        if above is not None and (name in wrong or (above or "the model") in without):
            raise ConfigError(
                f"the device map names {name}, and {above or 'the model'} is placed as a whole: write {above!r}"
            )
    if without:
        raise ConfigError(f"the device map gives no place to {listed(without)}; add them, or '' for the rest")
    if wrong:
        raise ConfigError(f"the device map names {listed(sorted(wrong))}, which this model does not have")
    return places


def _above(name: str, whole: Collection[str]) -> str | None:
    """The name above this one that is among `whole`."""
    while name:
        name = name.rpartition(".")[0]
        if name in whole:
            return name
    return None


def _at_and_above(part: Part) -> Iterator[str]:
    for key in part.keys:
        while key:
            yield key
            key = key.rpartition(".")[0]


def _nearest(name: str, device_map: Mapping[str, str]) -> str | None:
    while True:
        if name in device_map:
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]
