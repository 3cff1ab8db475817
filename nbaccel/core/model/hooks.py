"""Hooks of ours on a user's modules, which copies and pickles of these do not have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["Hook", "uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn`, which torch.compile is to leave alone with all that it calls: weights that come and go are no constants."""
    disabled: Callable[P, T] | None = None

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        # Nothing is compiled where this was not imported, which takes two seconds.
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(fn)  # type: ignore[no-untyped-call]
        return (disabled or fn)(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # not traced into either
    return run


@final
class Hook:
    """A hook of ours. A copied or pickled module has none of them: there it becomes one that does nothing."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = uncompiled(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _no_hook, (RemovableHandle.next_id,)


def _no_hook(next_id: int) -> Callable[..., Any]:
    # As torch does with handles: a hook that is put there in another process must not get a number that is taken,
    # for whether a hook gets keywords is kept by its number.
    RemovableHandle.next_id = max(RemovableHandle.next_id, next_id)
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
