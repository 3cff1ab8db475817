"""What one step of a model computes and keeps, found by running it without numbers."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from nbaccel.core.model.unchanged import unchanged
from nbaccel.errors import ConfigError

__all__ = ["Activations", "trace_step"]

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one forward and backward beside parameters and gradients; 0 where nothing was traced."""

    peak: int = 0
    with_gradients: int = 0
    """The peak of activations and whole gradients together."""
    held: int = 0
    """Still held when the optimizer steps: the outputs."""
    flops: int = 0
    """Floating-point operations of forward and backward."""


_SHORT, _LONGER = 2, 4
"""Blocks of a deep model that are traced, to go on from; more are not needed, as they are alike."""
_DEEP = 8


def trace_step(
    model: nn.Module, batch: Any, *, dtype: torch.dtype | None = None, loss: LossFunction | None = None
) -> Activations:
    """Runs forward and backward on tensors that have shapes and no memory; hooks on modules are called with them.

    Of a model with more than eight equal blocks two and four are run: what a block adds is the same for each.
    Meanwhile the model has only these. Afterwards it has its own blocks and attributes again, as far as
    `nbaccel.core.model.unchanged` says.

    Args:
        model: on any device, the meta device too.
        batch: what the model is called with: a tensor, a tuple of arguments, or a mapping of keywords.
        dtype: what floating-point parameters and inputs are computed in; None: what they are.
        loss: `loss(model, batch)`; None: the output's `.loss`, else the mean of its first tensor.

    Raises:
        ConfigError: the step cannot be traced; the message says why.
    """
    blocks = _equal_blocks(model)
    if blocks is None:
        return _trace(model, batch, dtype, loss)
    parent, name, listed = blocks
    try:
        parent._modules[name] = listed[:_SHORT]
        short = _trace(model, batch, dtype, loss)
        parent._modules[name] = listed[:_LONGER]
        longer = _trace(model, batch, dtype, loss)
    except ConfigError:
        parent._modules[name] = listed
        return _trace(model, batch, dtype, loss)
    finally:
        parent._modules[name] = listed
    more = (len(listed) - _LONGER) / (_LONGER - _SHORT)

    def extended(low: int, high: int) -> int:
        return round(high + more * (high - low))

    return Activations(
        peak=extended(short.peak, longer.peak),
        with_gradients=extended(short.with_gradients, longer.with_gradients),
        held=extended(short.held, longer.held),
        flops=extended(short.flops, longer.flops),
    )


def _equal_blocks(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList | nn.Sequential] | None:
    """The longest list of more than eight modules of one class and equal parameters, and where it is."""
    found: tuple[nn.Module, str, nn.ModuleList | nn.Sequential] | None = None
    for parent in model.modules():
        for name, child in parent.named_children():
            if not isinstance(child, (nn.ModuleList, nn.Sequential)) or len(child) <= _DEEP:
                continue
            kinds = {(type(one), tuple((k, p.shape) for k, p in one.named_parameters())) for one in child}
            if len(kinds) == 1 and (found is None or len(child) > len(found[2])):
                found = (parent, name, child)
    return found


def _trace(model: nn.Module, batch: Any, dtype: torch.dtype | None, loss: LossFunction | None) -> Activations:
    live = _Live()
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), unchanged(model), _unlogged():
        try:
            state = _state(model, dtype, live)
            inputs = tree_map_only(Tensor, lambda tensor: _fake(tensor, dtype), batch)
            stand_in = _StandIn(model, state)
            with live, counter:
                output = loss(stand_in, inputs) if loss is not None else _call(stand_in, inputs)
                _one_number(output).backward()  # type: ignore[no-untyped-call]
                live.finish()
        except Exception as error:  # whatever the user's model or loss does
            raise ConfigError(
                f"one step of {type(model).__name__} cannot be traced: {_why(error)}"
            ) from error
    del output  # held until here, as a loop holds it
    return Activations(
        peak=live.peak,
        with_gradients=live.peak_with_gradients,
        held=live.held,
        flops=counter.get_total_flops(),
    )


def _state(model: nn.Module, dtype: torch.dtype | None, live: _Live) -> dict[str, Tensor]:
    """Stand-ins for parameters, tied ones one, and buffers by name; `live` knows of them."""
    parameters = {id(p): p for p in model.parameters()}
    fakes = {key: _fake(p, dtype) for key, p in parameters.items()}
    state = {name: fakes[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    state |= {name: _fake(buffer, dtype) for name, buffer in model.named_buffers()}
    for fake in state.values():
        live.ignore(fake)
    for fake in fakes.values():
        if fake.requires_grad:
            fake.register_post_accumulate_grad_hook(live.accumulated)  # type: ignore[no-untyped-call]
    return state


def _why(error: Exception) -> str:
    """Why a step cannot be traced."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"what it computes depends on numbers ({error.func}), and a traced step has none"
    return f"{type(error).__name__}: {error}"


@contextmanager
def _unlogged() -> Iterator[None]:
    """What torch logs of an operation without numbers that fails is in the error as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@final
class _StandIn(nn.Module):
    """The model, computing with other parameters."""

    user: nn.Module
    state: dict[str, Tensor]

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "user", model)  # not as a child: it has parameters of its own
        object.__setattr__(self, "state", state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.user, self.state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "user"), name)


@final
class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operations make, until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.peak_with_gradients = self.held = 0
        self._now = self._gradients = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, result)
        return result

    def _made(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return tensor
        self._known.add(storage)
        count = storage.nbytes()
        self._now += count
        weakref.finalize(storage, self._freed, count)
        self.peak = max(self.peak, self._now - self._gradients)
        self.peak_with_gradients = max(self.peak_with_gradients, self._now)
        return tensor

    def ignore(self, tensor: Tensor) -> None:
        """Does not count what was there before."""
        self._known.add(tensor.untyped_storage())

    def _freed(self, count: int) -> None:
        self._now -= count

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient is complete: it is counted with the gradients."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def finish(self) -> None:
        """Backward is over."""
        self.held = max(0, self._now - self._gradients)


def _fake(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the same shape on the CPU, without memory, which needs a gradient where that does."""
    narrow = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=narrow, device="cpu", requires_grad=tensor.requires_grad
    )


def _call(model: _StandIn, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        try:
            inspect.signature(model.user.forward).bind(*batch)
        except TypeError:
            return model(batch[0])  # inputs and targets of a model that takes inputs
        return model(*batch)
    return model(batch)


def _one_number(value: Any) -> Tensor:
    if getattr(value, "loss", None) is not None:
        found: Tensor = value.loss
        return found
    first = next(_tensors(value), None)
    if first is None:
        raise ConfigError(
            "nothing it returns needs a gradient: either nothing in it is trained, or its loss is made elsewhere "
            "(plan takes loss=lambda model, batch: ...)"
        )
    return first if first.ndim == 0 else first.float().mean()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.requires_grad:
        yield value
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    for part in parts:
        yield from _tensors(part)
