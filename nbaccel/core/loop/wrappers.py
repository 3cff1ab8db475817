"""What `prepare` gives back: the user's own objects, made to obey the accumulation window.

What stands in for a `forward` has its signature and name: transformers' `generate` reads there whether the model takes
`position_ids` and an `attention_mask`, and leaves out without a word what it does not find.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from nbaccel.core.inner_optimizer import InnerOptimizer
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.step_times import DeviceClock, Stopwatch
from nbaccel.core.model.float8 import compute_in_float8, restore_linears
from nbaccel.core.nested import map_tensors
from nbaccel.core.precision import Precision
from nbaccel.errors import ConfigError

__all__ = [
    "ConvertedForward",
    "PreparedOptimizer",
    "PreparedScheduler",
    "TimedForward",
    "is_scheduler",
    "patch_forward",
    "restore_forward",
]

_HALF = (torch.float16, torch.bfloat16)
_clock = time.perf_counter


@final
class ConvertedForward:
    """Stands in for a module's `forward`: computes in the precision and gives float32 back."""

    def __init__(self, module: nn.Module, inner: Callable[..., Any], precision: Precision) -> None:
        self._module = module
        self.inner = inner
        # One context reused: making one costs more than entering it.
        self._autocast = precision.autocast()
        self._inside = False
        functools.update_wrapper(self, inner, updated=())

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            # A module that calls itself is in the context already.
            return self.inner(*args, **kwargs)
        self._inside = True
        try:
            with self._autocast:
                output = self.inner(*args, **kwargs)
        finally:
            self._inside = False
        if type(output) is torch.Tensor:
            return output.float() if output.dtype in _HALF else output
        return map_tensors(lambda t: t.float() if t.dtype in _HALF else t, output)

    def __reduce__(self) -> Any:
        return _plain_forward(self._module)


@final
class TimedForward:
    """Stands in for a module's `forward`: takes its time."""

    def __init__(self, module: nn.Module, inner: Callable[..., Any], stopwatch: Stopwatch) -> None:
        self._module = module
        self.inner = inner
        self._stopwatch = stopwatch
        functools.update_wrapper(self, inner, updated=())

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self._stopwatch
        if watch.device is not None:
            return self._on_device(watch.device, args, kwargs)
        before, started = watch.forward, _clock()
        if not before:
            watch.begin(started)
        output = self.inner(*args, **kwargs)
        # Not added to what is there now: models inside, and a module that calls itself, count once.
        watch.forward = before + (_clock() - started)
        return output

    def _on_device(self, device: DeviceClock, args: Any, kwargs: Any) -> Any:
        event = device.mark()
        output = self.inner(*args, **kwargs)
        device.add("forward", event)
        return output

    def __reduce__(self) -> Any:
        return _plain_forward(self._module)


def _plain_forward(module: nn.Module) -> Any:
    # A copy or a pickle of the module gets its plain forward back: the copy is not prepared. `getattr` finds
    # the class's, for a module that is being made again has no attributes of its own yet.
    return getattr, (module, "forward")


def patch_forward(module: nn.Module, precision: Precision, stopwatch: Stopwatch | None) -> None:
    """Let calls of `module` compute in the precision, and be timed where there is a stopwatch."""
    _take_off(module)
    if precision.fp8 is not None:
        compute_in_float8(module, precision.fp8, emulate=precision.emulates_fp8)
    compiled = module._compiled_call_impl is not None
    # Around a compiled call: inside it the clock would break the graph.
    name = "_compiled_call_impl" if compiled else "forward"
    if precision.dtype is not None:
        setattr(module, name, ConvertedForward(module, getattr(module, name), precision))
    if stopwatch is not None:
        setattr(module, name, TimedForward(module, getattr(module, name), stopwatch))


def restore_forward(module: nn.Module) -> None:
    """Take off again what `patch_forward` put there."""
    _take_off(module)
    restore_linears(module)


def _take_off(module: nn.Module) -> None:
    while isinstance(module.__dict__.get("forward"), _PATCHES):
        inner = module.__dict__.pop("forward").inner
        if getattr(inner, "__func__", None) is not type(module).forward:
            module.forward = inner
    compiled: Any = module.__dict__.get("_compiled_call_impl")
    while isinstance(compiled, _PATCHES):
        module._compiled_call_impl = compiled = compiled.inner


_PATCHES = (ConvertedForward, TimedForward)


@final
class PreparedOptimizer(InnerOptimizer):
    """The user's optimizer (`.optimizer`); it steps and zeroes only where the window ends.

    An Optimizer by type only, so that schedulers accept it; everything is the inner one's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, loop: Loop, *, leads: bool) -> None:
        self.optimizer = optimizer
        self._loop = loop
        # For what is called in every step: with __getattr__ below, each look-up of an attribute is slow.
        self._parts = loop, optimizer, leads
        self._consumed = False
        self.ran = False
        """Whether the inner optimizer really stepped in the last `step` (with a scaler only)."""
        if loop.scaler is not None:
            optimizer.register_step_post_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.ran = True

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was left out because the scaler found an overflow."""
        return self._loop.skipped

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The inner optimizer's step, at the end of a window; nothing elsewhere.

        Raises:
            ConfigError: a closure, whose every call begins its gradients anew, in a window of several micro-steps.
        """
        loop, inner, leads = self._parts
        if closure is not None and loop.window.length > 1:
            raise ConfigError(
                f"step(closure) on rank {loop.world.rank} cannot go with gradient_accumulation_steps="
                f"{loop.window.length}: a closure computes the gradients of the batch in hand anew, and those of the "
                "batches before would be lost. Accumulate inside the closure, over several batches, and leave "
                "gradient_accumulation_steps out"
            )
        if not loop.window.sync:
            return None
        self._consumed = True
        if not loop.plain:
            return loop.optimizer_step(self, closure, leads=leads)
        watch = loop.stopwatch
        started = 0.0 if watch is None else _clock()
        result = inner.step() if closure is None else inner.step(closure)
        loop.steps += leads
        if watch is not None:
            watch.until = ended = _clock()
            watch.optimizer += ended - started
            if leads:
                watch.steps += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients once per window: after its step, or before its first backward."""
        loop, inner, _ = self._parts
        window = loop.window
        if self._consumed or not window.dirty:
            self._consumed = False
            inner.zero_grad(set_to_none)
            if loop.scaling is not None:
                loop.scaling.zeroed(inner)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)
        if not self._loop.strategy.plain:
            self._loop.learning.look()

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.optimizer.register_step_post_hook(hook)

    def train(self) -> None:
        """For schedule-free optimizers."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """For schedule-free optimizers."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __reduce__(self) -> Any:
        # A copy or a pickle is the user's optimizer, as that of a prepared model is its own: the loop stays here.
        return _itself, (self.optimizer,)

    def __repr__(self) -> str:
        return f"PreparedOptimizer({self.optimizer!r})"


def _itself(value: Any) -> Any:
    return value


def is_scheduler(value: object) -> bool:
    """Whether `value` is a learning-rate scheduler, torch's or one that looks like it."""
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return True
    return all(
        callable(getattr(value, name, None)) for name in ("step", "state_dict", "load_state_dict")
    ) and (hasattr(value, "get_last_lr") or hasattr(value, "optimizer"))


@final
class PreparedScheduler:
    """The user's scheduler (`.scheduler`): one step per optimizer step, none when that was skipped.

    Args:
        repeat: steps per optimizer step; above 1 only for scripts that count on one per rank.
    """

    def __init__(self, scheduler: Any, loop: Loop, *, follows: bool, repeat: int) -> None:
        self.scheduler = scheduler
        self._loop = loop
        self._follows = follows
        self._repeat = repeat

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The inner scheduler's step, where the optimizer has stepped; between passes in any case, as the pass's."""
        loop = self._loop
        if self._follows and not loop.between_passes and (not loop.window.sync or loop.skipped):
            return
        if not loop.resuming.may_schedule(loop.steps):
            return
        for _ in range(self._repeat):
            # a schedule that ends (OneCycleLR) was counted for all these steps, of which the last may be too many
            if self._repeat == 1 or self._goes_on():
                self.scheduler.step(*args, **kwargs)

    def _goes_on(self) -> bool:
        total = getattr(self.scheduler, "total_steps", None)
        return total is None or self.scheduler._step_count <= total

    def state_dict(self) -> dict[str, Any]:
        """The inner scheduler's."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inner scheduler's."""
        self.scheduler.load_state_dict(state_dict)

    def get_last_lr(self) -> list[float]:
        """The inner scheduler's."""
        rates: list[float] = self.scheduler.get_last_lr()
        return rates

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __reduce__(self) -> Any:
        return _itself, (self.scheduler,)
