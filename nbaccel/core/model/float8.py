"""Linear layers that multiply in float8: what stands in for their `forward`, and taking it off again.

The layers stay the user's own: class, name, hooks and parameters, which strategies exchange and shard. What
computes is a companion by torchao (or transformer-engine) that is no submodule and has no parameters but
theirs: both see one dict, so whatever a strategy puts there both have.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options

__all__ = ["Float8Forward", "compute_in_float8", "restore_linears"]

_MULTIPLE = 16  # of both sizes of a matrix: what the hardware's instructions take


@final
class Float8Forward:
    """Stands in for a linear layer's `forward`.

    Args:
        companion: computes what `module` does, in float8, with the module's parameters.
    """

    def __init__(self, module: nn.Linear, companion: Callable[[Tensor], Tensor]) -> None:
        self._module, self._companion = module, companion

    def __call__(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return self._companion(input)

    def __reduce__(self) -> Any:
        # a copy of the module is a plain one; while it is being made, it has its class's forward only
        return getattr, (self._module, "forward")


def compute_in_float8(model: nn.Module, options: FP8Options, *, emulate: bool) -> None:
    """Lets linear layers of `model` multiply in float8, forward and backward.

    Args:
        emulate: with rounded float32, where the device has no float8 instructions; torchao only.

    Raises:
        ConfigError: the package is missing; no layer can; `options.skip` names none of the layers.
    """
    restore_linears(model)
    chosen = _choose(model, options.skip)
    make = _torchao(options, emulate) if options.backend == "torchao" else _transformer_engine(emulate)
    for layer in chosen:
        layer.forward = Float8Forward(layer, make(layer))  # type: ignore[method-assign]


def restore_linears(model: nn.Module) -> None:
    """Gives the layers their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Float8Forward):
            del module.forward


def _choose(model: nn.Module, skip: Sequence[str] | None) -> list[nn.Linear]:
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    skipped = _skipped(linears, skip)
    chosen = [one for name, one in linears.items() if name not in skipped and _can(one)]
    if not chosen:
        raise ConfigError(
            f"mixed_precision='fp8': a {type(model).__name__} has no layer to compute in float8. It takes nn.Linear "
            f"layers whose sizes are multiples of {_MULTIPLE}, and leaves out the last one unless FP8Options(skip=[]) "
            "says otherwise. Use mixed_precision='bf16'."
        )
    return chosen


def _skipped(linears: Mapping[str, nn.Linear], skip: Sequence[str] | None) -> set[str]:
    if skip is None:
        return set(list(linears)[-1:])
    found: set[str] = set()
    for asked in skip:
        pattern = re.escape(asked).replace(r"\*", "[^.]+")
        matched = {name for name in linears if re.fullmatch(pattern, name)}
        if not matched:
            raise ConfigError(
                f"fp8: skip names {asked!r}, but the model has no such linear layer; the first of its are "
                f"{', '.join(list(linears)[:5])}"
            )
        found |= matched
    return found


def _can(layer: nn.Linear) -> bool:
    own = type(layer).forward is nn.Linear.forward and "forward" not in layer.__dict__
    # torch's attention reads the weight of its output layer and never calls it
    called = not isinstance(layer, NonDynamicallyQuantizableLinear)
    weight = layer._parameters.get("weight")
    return own and called and weight is not None and not any(size % _MULTIPLE for size in weight.shape)


def _torchao(options: FP8Options, emulate: bool) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    try:
        with _quiet():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "mixed_precision='fp8' needs torchao; install it with pip install 'nbaccel[fp8]'"
        ) from error
    # padding: the hardware wants multiples of 16 rows of the batch too, when it multiplies for the weights
    config = replace(
        Float8LinearConfig.from_recipe_name(options.recipe), emulate=emulate, pad_inner_dim=not emulate
    )

    def make(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        return _sharing(convert_to_float8_training(nn.Sequential(layer), config=config)[0], layer)

    return make


@contextmanager
def _quiet() -> Iterator[None]:
    # torchao's import tells which of its kernels do not load here; training in float8 uses none of them
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _transformer_engine(emulate: bool) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8CurrentScaling
    except ImportError as error:
        raise ConfigError(
            "FP8Options(backend='transformer_engine') needs transformer-engine; install it with pip install "
            "'nbaccel[transformer-engine]', or take backend='torchao'"
        ) from error
    if emulate:
        raise ConfigError(
            "FP8Options(backend='transformer_engine') needs a CUDA device with float8 instructions (compute "
            "capability 8.9 or newer); backend='torchao' emulates them"
        )
    recipe = Float8CurrentScaling()

    def make(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        sizes = layer.in_features, layer.out_features
        companion = te.Linear(
            *sizes, bias=layer.bias is not None, params_dtype=layer.weight.dtype, device="meta"
        )
        compute = _sharing(companion, layer)

        def forward(input: Tensor) -> Tensor:
            with te.autocast(recipe=recipe):
                return compute(input)

        return forward

    return make


def _sharing(companion: nn.Module, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    companion._parameters = layer._parameters
    return companion.forward
