"""From parameters on the meta device to parameters with values, one part of a model after another."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import nn

from nbaccel.errors import ConfigError

__all__ = ["give_back_memory", "materialise"]

_MARK = "_is_hf_initialized"
"""By which transformers knows what it need not initialise."""


@torch.no_grad()
def materialise(part: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Gives memory and initial values to what is on the meta device in `part` of `model`; the rest stays.

    Values come from the model's own `_init_weights` (as transformers' models have) or from each module's
    `reset_parameters`. Tied parameters stay tied.

    Raises:
        ConfigError: a module has neither, or a buffer on the meta device, whose value nobody knows.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(part.modules()):
        empty = [n for n, p in module._parameters.items() if p is not None and p.is_meta]
        lost = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if lost:
            raise ConfigError(
                f"buffer {lost[0]!r} of a {type(module).__name__} is on the meta device, and its value is lost; "
                "build the model with init_empty_weights(include_buffers=False)"
            )
        if not empty:
            continue
        initialise = _initialiser(module, model)
        fresh = False
        for name in empty:
            old = module._parameters[name]
            assert old is not None
            fresh |= old not in made
            made.setdefault(old, _empty(old, device))
            module._parameters[name] = made[old]
        if fresh:  # a module all of whose parameters are another's keeps what that one got
            initialise()


def _empty(old: nn.Parameter, device: torch.device) -> nn.Parameter:
    new = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name != _MARK})
    return new


def _initialiser(module: nn.Module, model: nn.Module) -> Callable[[], object]:
    whole = getattr(model, "_init_weights", None)
    if callable(whole):
        return lambda: whole(module)
    for name in ("reset_parameters", "_reset_parameters"):
        own = getattr(module, name, None)
        if callable(own):
            return own  # type: ignore[no-any-return]
    raise ConfigError(
        f"a {type(module).__name__} has parameters on the meta device and no reset_parameters() to give them "
        "values; give it one, or build the model without init_empty_weights"
    )


def give_back_memory() -> None:
    """Hands freed main memory back to the system; glibc may keep as much as was ever in use at once."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
