"""Activation checkpointing of one module: its activations are computed again in backward."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_in_backward"]


@final
class _Recomputed:
    """Stands in for a module's `forward`; names of parameters stay as they are."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self._forward, updated=())  # callers read a forward's signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)

    def __reduce__(self) -> Any:
        # a copy of the module is a plain one
        return types.MethodType, (type(self._module).forward, self._module)


def recompute_in_backward(module: nn.Module) -> None:
    """Keeps only the inputs of `module` for backward; once, however often it is asked."""
    if not isinstance(module.forward, _Recomputed):
        module.forward = _Recomputed(module)
