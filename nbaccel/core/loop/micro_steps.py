"""Micro-steps: the window each belongs to, and its five obligations in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from torch import Tensor, nn

from nbaccel.core.loop.accumulate import Window
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.wrappers import PreparedOptimizer, PreparedScheduler

__all__ = ["MicroSteps"]

Backward = Callable[[Tensor, "float | Tensor | None"], None]
Clip = Callable[["Iterable[Tensor]", float], "Tensor | None"]


@final
class MicroSteps:
    """The context `accumulate` returns, one object because it is entered in every micro-step; and `step`.

    Args:
        prepared: the prepared model for one of the user's, which itself will do too.
    """

    def __init__(self, loop: Loop, prepared: Callable[[nn.Module], nn.Module]) -> None:
        self._loop = loop
        self._prepared = prepared
        self._window = loop.window
        self._inside = False
        self._spread = not loop.strategy.plain

    def of(self, models: tuple[nn.Module, ...]) -> MicroSteps:
        """The context for a micro-step of these models, of all if there are none."""
        self._window = self._loop.windows.get(models) or self._new_window(models)
        return self

    def _new_window(self, models: tuple[nn.Module, ...]) -> Window:
        loop = self._loop
        prepared = [self._prepared(model) for model in models]
        # The common case, one model or all of them, shares the window of a bare accumulate().
        window = loop.windows[()] if set(prepared) == set(loop.models) else loop.new_window(prepared)
        loop.windows[models] = window
        return window

    def __enter__(self) -> None:
        loop, window = self._loop, self._window
        loop.window, loop.between_passes = window, False
        window.begin(loop.loader)
        self._inside = True
        if self._spread and not window.sync:
            for model in window.models:
                loop.strategy.set_sync(model, False)

    def __exit__(self, *_: object) -> None:
        window = self._window
        self._inside = False
        if self._spread and not window.sync:
            for model in window.models:
                self._loop.strategy.set_sync(model, True)
        window.end()

    def step(
        self,
        loss: Tensor,
        optimizer: PreparedOptimizer,
        scheduler: PreparedScheduler | None,
        weight: float | Tensor | None,
        clip: float | None,
        *,
        do_backward: Backward,
        do_clip: Clip,
    ) -> Tensor | None:
        """Backward, clip, optimizer, scheduler, zero_grad; the norm before clipping, where it was clipped."""
        loop, outside = self._loop, not self._inside
        if outside:
            self._begin(loss)
        do_backward(loss, weight)
        norm = None
        if loop.window.sync:
            if clip is not None:
                norm = do_clip([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        if outside:
            self._end()
        return norm

    def _begin(self, loss: Tensor) -> None:
        loop = self._loop
        loop.window = window = loop.windows[()]
        loop.between_passes = False
        expected = window.micro + 1 >= window.length
        window.begin(loop.loader)
        if window.sync and not expected and self._spread:
            for model in window.models:
                loop.strategy.sync_in_backward(model, [loss])

    def _end(self) -> None:
        loop = self._loop
        loop.window.end()
        if loop.length > 1:
            for model in loop.window.models:
                loop.strategy.set_sync(model, loop.window.micro + 1 >= loop.length)
