"""Who does what: one rank first, one rank only, a share for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from nbaccel.core.collectives import barrier
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["first", "on", "only_if", "share_of"]

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def first(world: World, goes_first: bool) -> Iterator[None]:
    """The ranks for which `goes_first` run the block before the others enter it."""
    if not goes_first:
        barrier(world)
    try:
        yield
    finally:
        if goes_first:
            barrier(world)


def only_if(condition: bool, function: F) -> F:
    """`function` where `condition` holds; elsewhere a function that returns None."""
    if condition:
        return function

    @functools.wraps(function)
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return cast(F, nothing)


def on(function: Callable[..., Any] | None, wanted: int | None, index: int) -> Any:
    """A decorator, or `function` decorated: runs where `index` is the wanted one (0 if None)."""
    if function is None:
        return lambda fn: only_if(index == (wanted or 0), fn)
    return only_if(index == (wanted or 0), function)


def share_of(inputs: Any, *, rank: int, size: int, pad: bool) -> Any:
    """This rank's contiguous part of a list, tuple, string, tensor or dataset, or of each in a dict.

    The first ranks get one element more when it does not divide evenly. With `pad` the shorter parts
    repeat the last element of the whole, so that all parts have one length.

    Raises:
        ConfigError: the values of a dict have different lengths, or it cannot be cut.
    """
    if isinstance(inputs, dict):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"split_between_processes needs values of one length; these have {lengths}")
        return {key: share_of(value, rank=rank, size=size, pad=pad) for key, value in inputs.items()}
    try:
        length = len(inputs)
    except TypeError:
        raise ConfigError(f"split_between_processes cannot cut a {type(inputs).__name__}") from None
    base, extra = divmod(length, size)
    start = rank * base + min(rank, extra)
    stop = start + base + (rank < extra)
    missing = (base + (extra > 0)) - (stop - start) if pad and length else 0
    if isinstance(inputs, (list, tuple, str)):
        whole: Any = inputs
        return whole[start:stop] + whole[-1:] * missing
    if isinstance(inputs, torch.Tensor):
        part = inputs[start:stop]
        return torch.cat([part, inputs[-1:].expand(missing, *inputs.shape[1:])]) if missing else part
    indices = [*range(start, stop), *[length - 1] * missing]
    if callable(getattr(inputs, "select", None)):
        return inputs.select(indices)  # a Hugging Face data set
    raise ConfigError(
        f"split_between_processes cannot cut a {type(inputs).__name__}; give a list or a tensor"
    )
