"""Which modules of a model are treated one at a time: gathered, recomputed, placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from nbaccel.errors import ConfigError

__all__ = ["Wrap", "find_blocks", "keep_ties_together", "owners", "repeated_blocks"]

Wrap = str | int | type | Sequence[str | type] | Callable[[Any], bool]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called themselves
_READING = (nn.MultiheadAttention,)  # never call what is in them, but read its parameters


def find_blocks(model: nn.Module, wrap: Wrap) -> list[nn.Module]:
    """The modules below `model` that `wrap` names, in the order they are registered, outer before inner.

    Args:
        wrap: "auto", "none", classes or their names, a number of parameters, or a function; see `FSDP.wrap`.

    Raises:
        ConfigError: the model has no module of that class, or a container was chosen, which is never called.
    """
    if isinstance(wrap, int):
        return _by_size(model, wrap)
    if callable(wrap) and not isinstance(wrap, type):
        chosen = [module for module in _below(model) if wrap(module)]
        uncalled = _uncalled(model)
        held = [type(module).__name__ for module in chosen if module in uncalled]
        if held:
            raise ConfigError(
                f"wrap chose a {held[0]}, which is never called: choose what is in it, or around it"
            )
        return chosen
    if wrap == "none":
        return []
    if wrap == "auto":
        names = getattr(model, "_no_split_modules", None)
        found = _by_class(model, names) if names else []
        return found or repeated_blocks(model)
    listed = [wrap] if isinstance(wrap, (str, type)) else list(wrap)
    names = [one if isinstance(one, str) else one.__name__ for one in listed]
    there = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names if name not in there]
    if missing:
        raise ConfigError(
            f"wrap names {', '.join(missing)}, but the model has no such module; its classes are "
            f"{', '.join(sorted(there))}"
        )
    return _by_class(model, names)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with parameters that stand beside others of their class in a list or sequence."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        counts = Counter(type(child) for child in module)
        for child in module:
            repeated = counts[type(child)] > 1 and not isinstance(child, _CONTAINERS)
            if repeated and child not in inside and any(True for _ in child.parameters()):
                found.append(child)
                inside.update(child.modules())
    return found


def keep_ties_together(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks without those that hold only a part of the places of a tied parameter.

    A parameter that is sharded in one block and used in another too would become two.
    """
    kept = list(blocks)
    while True:
        places_of: dict[int, set[nn.Module]] = {}
        for parameter, owner in owners(model, set(kept)):
            places_of.setdefault(id(parameter), set()).add(owner)
        split = {owner for places in places_of.values() if len(places) > 1 for owner in places}
        left = [block for block in kept if block not in split]
        if len(left) == len(kept):
            return kept
        kept = left


def owners(model: nn.Module, blocks: set[nn.Module]) -> Iterator[tuple[nn.Parameter, nn.Module]]:
    """Each place of a parameter with the innermost block it is in, or the model."""
    return _owned(model, model, blocks)


def _owned(
    module: nn.Module, owner: nn.Module, blocks: set[nn.Module]
) -> Iterator[tuple[nn.Parameter, nn.Module]]:
    """Each place of a parameter with the innermost block it is in; shared modules once for each place."""
    owner = module if module in blocks else owner
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, owner
    for child in module._modules.values():
        if child is not None:
            yield from _owned(child, owner, blocks)


def _below(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if module is not model)


def _by_class(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [module for module in _below(model) if type(module).__name__ in names]


def _uncalled(model: nn.Module) -> set[nn.Module]:
    """Modules whose parameters others use, or which only hold others: no gathering before their call would come."""
    read = (
        child for module in model.modules() if isinstance(module, _READING) for child in module.children()
    )
    return {*read, *(module for module in model.modules() if isinstance(module, _CONTAINERS))}


def _by_size(model: nn.Module, least: int) -> list[nn.Module]:
    """Modules of at least so many parameters that are in no smaller such module."""
    chosen: set[nn.Module] = set()
    uncalled = _uncalled(model)

    def remaining(module: nn.Module) -> int:
        count = sum(p.numel() for p in module.parameters(recurse=False))
        count += sum(remaining(child) for child in module.children() if child not in chosen)
        if count >= least and module is not model and module not in uncalled:
            chosen.add(module)
            return 0
        return count

    remaining(model)
    return [module for module in _below(model) if module in chosen]
