"""torch.compile with a cache that outlives the process, so that the next launch does not compile again."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from nbaccel.core.world import cache_folder

__all__ = ["compile_module", "uncompiled"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_module(module: nn.Module, mode: bool | str) -> None:
    """Compiles `module` in place at its first call; `mode` is True or a mode of torch.compile.

    What inductor makes is kept in the user's cache folder, for all later launches, unless the variable
    TORCHINDUCTOR_CACHE_DIR says where.
    """
    # Inductor looks here when it first compiles, and its own default is a temporary folder.
    os.environ.setdefault(_VARIABLE, str(cache_folder() / "inductor"))
    call_impl: Any = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return call_impl(*args, **kwargs)

    # What Module.compile does, but by way of a function of ours: dynamo passes over frames of torch's own
    # files, so that an nn.Sequential would stay as it is, in silence.
    options: dict[str, Any] = {} if mode is True else {"mode": mode}
    module._compiled_call_impl = torch.compile(call, **options)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module as it was before torch.compile, by `compile_module` or by the user."""
    inner = module._modules.get("_orig_mod")  # where what the function torch.compile gives back keeps it
    module = module if inner is None else inner
    module._compiled_call_impl = None
    return module
