"""The state of a training loop in progress, which the prepared objects and the Accelerator share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from torch import nn

from nbaccel.core.comm.frames import exchange_objects
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.accumulate import LossWeighting, Window
from nbaccel.core.loop.control import Control
from nbaccel.core.loop.learning import Learning
from nbaccel.core.loop.losses import EVERY_OR_NONE, UNEVEN, GivenWeights, check_one_number
from nbaccel.core.loop.resuming import Resuming
from nbaccel.core.loop.scaling import Scaling
from nbaccel.core.loop.step_times import Stopwatch
from nbaccel.core.loop.stopping import Trainers
from nbaccel.core.loop.thin_batches import ThinBatches
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.base import Strategy
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Loop", "Observer"]

_clock = time.perf_counter


class Steppable(Protocol):
    """What `Loop.optimizer_step` needs of a prepared optimizer."""

    optimizer: torch.optim.Optimizer
    ran: bool


class Observer(Protocol):
    """Who watches the loop's first steps."""

    def began(self, loader: ShardedLoader) -> None: ...
    def next_batch(self, loader: ShardedLoader) -> None: ...
    def ended(self, loader: ShardedLoader) -> None: ...
    def backward(self) -> None: ...
    def stepped(self) -> bool:
        """After an optimizer step; False ends the watching."""


@final
class Loop:
    """Which micro-step it is, over which loader, with which scaler; how far the run is.

    It is the loaders' `LoopControl`.
    """

    def __init__(
        self,
        *,
        world: World,
        strategy: Strategy,
        precision: Precision,
        control: Control | None,
        stopwatch: Stopwatch | None,
        length: int,
        weighting: LossWeighting,
    ) -> None:
        self.world, self.strategy, self.control, self.stopwatch = world, strategy, control, stopwatch
        self.length, self.weighting = length, weighting
        self.scaler = None if strategy.handles_precision else precision.make_scaler()
        self.scaling = None if self.scaler is None else Scaling(self.scaler, world.rank)
        self.models: list[nn.Module] = []
        self.window = self.new_window(self.models)
        """The window in progress; that of all models together unless `accumulate` named some."""
        self.windows: dict[tuple[nn.Module, ...], Window] = {(): self.window}
        self.learning = Learning(strategy)
        self.loaders: list[ShardedLoader] = []
        """Loaders being iterated, the innermost last."""
        self.trainers = Trainers(self.loaders, is_main=world.is_main)
        self.between_passes = False
        """Whether a pass is over and neither another one, nor a micro-step or an optimizer step, has begun since."""
        self.last_pass = (0, 0)
        """`pass_entries` of the loader whose pass was over last."""
        self.steps = 0
        """Optimizer steps of the first optimizer."""
        self.skipped = False
        """Whether the last optimizer step was left out, by the scaler or by the strategy."""
        self._several = world.size > 1
        self._device_clock = None if stopwatch is None else stopwatch.device
        self._watched = control is not None
        """Whether anybody is told of an optimizer step."""
        self.led = False
        """Whether there is a prepared optimizer, whose steps are counted."""
        self.plain = self.simple = False
        """Whether nothing is to be done at an optimizer step, in a backward, but torch's own work and perhaps
        a look at the host's clock."""
        self.uneven = False
        """Whether the ranks may have different numbers of batches."""
        self.before_pass: Callable[[ShardedLoader], None] = _nothing
        self.before_batch: Callable[[], None] = _nothing
        """Called when control asks for a save, at a point where the position is between batches."""
        self.after_pass: Callable[[], None] = _nothing
        """Called when no loader is being iterated any more."""
        self._observer: Observer | None = None
        self.resuming = Resuming()
        self._thin = ThinBatches()
        self._in_turns = False
        self._unled_steps = 0
        self._given_weights = GivenWeights(world, strategy, stopwatch)
        self._choose_paths()

    def _choose_paths(self) -> None:
        skips = self.scaler is not None or self.strategy.handles_precision
        bare = not skips and self.length == 1 and self._device_clock is None
        alone = bare and self._observer is None
        self.plain = alone and self.control is None
        self.simple = alone and self.strategy.plain and (self.control is None or self.led)
        self._watched = self.control is not None or self._observer is not None

    def new_window(self, models: list[nn.Module]) -> Window:
        """A fresh window over `models`."""
        return Window(
            models, length=self.length, num_ranks=self.strategy.data_axis.size, weighting=self.weighting
        )

    @property
    def unfinished(self) -> Window | None:
        """A window that waits for more micro-steps."""
        return next((w for w in self.windows.values() if w.micro or not w.sync), None)

    def change_length(self, length: int) -> None:
        """Windows have so many micro-steps from the next one on. Called on all ranks.

        Raises:
            ConfigError: one is not finished.
            CollectiveMismatch: the ranks ask for different lengths.
        """
        if (window := self.unfinished) is not None:
            raise ConfigError(
                f"gradient_accumulation_steps cannot be changed on rank {self.world.rank} in micro-step "
                f"{window.micro + 1} of {window.length}: change it between two windows, after a step"
            )
        if self._several:
            exchange_objects(
                "gradient_accumulation_steps", None, world=self.world, signature=f"{length} micro-steps"
            )
        self.length = length
        for window in self.windows.values():
            window.length = length
            for model in window.models:
                # The next micro-step begins a window; the last one may have left it for the middle of one.
                self.strategy.set_sync(model, True)
        self._choose_paths()

    def watch(self, observer: Observer | None) -> None:
        """Tells `observer` what happens until its `stepped` returns False (None: tells nobody)."""
        self._observer = observer
        self._choose_paths()

    def is_watched_by(self, observer: Observer) -> bool:
        """Whether `observer` is told of steps."""
        return self._observer is observer

    def regroup(self) -> None:
        """The next micro-step is the first of a window, and what one in progress has accumulated is gone; which loader
        trains is found out anew."""
        self.trainers = Trainers(self.loaders, is_main=self.world.is_main)
        for window in self.windows.values():
            for model in window.models:
                self.strategy.set_sync(model, True)
                if window.micro or window.dirty:
                    for parameter in model.parameters():
                        parameter.grad = None
            window.drop()
        self.resuming.regroup()
        if self.scaling is not None:
            self.scaling.drop()

    def lead(self, led: bool) -> None:
        """Whether there is a prepared optimizer from now on."""
        self.led = led
        self._choose_paths()

    def forget(self) -> None:
        """What was prepared, and what knows it."""
        self.models.clear()
        if self.scaling is not None:
            self.scaling.drop()
        self.learning.forget()
        self.window = self.new_window(self.models)
        self.windows = {(): self.window}
        self.trainers = Trainers(self.loaders, is_main=self.world.is_main)
        self.resuming = Resuming()
        self.lead(False)

    # What the loaders tell ---------------------------------------------------------------------------

    def began(self, loader: ShardedLoader) -> None:
        """A pass over `loader` is about to begin."""
        self.before_pass(loader)
        if loader in self.loaders:  # an iterator over it is held, and gets no further batch
            self.loaders.remove(loader)
        counts = self.led and self.unfinished is None
        self.resuming.began(loader, self.steps, outermost=not self.loaders, counts=counts)
        if not self.strategy.plain:
            self.learning.look()
        if self.stopwatch is not None:
            self.stopwatch.begin(_clock())
        self._thin.began(loader, self.models)
        self.trainers.began(loader)
        self.between_passes = False
        self.loaders.append(loader)
        if self._observer is not None:
            self._observer.began(loader)

    def ended(self, loader: ShardedLoader) -> None:
        """The pass is over."""
        self._thin.ended(loader)
        self.trainers.ended(loader)
        if self._observer is not None:
            self._observer.ended(loader)
        if loader in self.loaders:
            self.loaders.remove(loader)
        self.last_pass = loader.pass_entries
        if not self.loaders:
            self.between_passes = True
            self.after_pass()
        self.resuming.ended(loader, self.steps, outermost=not self.loaders)

    def should_stop(self, loader: ShardedLoader) -> bool:
        """Whether `loader`'s pass ends before its next batch."""
        if self.resuming and self.resuming.leaves_out(loader, self.steps):
            return True
        if self._several and loader is not self.loaders[-1] and not self._in_turns:
            self._tell_of_turns()
        if self._watched:
            self.trainers.asked(loader)
        if self._observer is not None:
            self._observer.next_batch(loader)
        control = self.control
        if control is None:
            return False
        if not (self.led or self.models) and self.world.size == 1:
            self._tick_unled()
        if control.interrupting:
            control.interrupt()
        if control.saving and self.window.micro == 0 and loader in self.trainers:
            self.before_batch()
        return control.stopping and self.trainers.stops(loader)

    def why_stopped(self, loader: ShardedLoader) -> str:
        """For the StopIteration of a `next()` that did not expect it."""
        if self.resuming.leaves_out(loader, self.steps):
            return self.resuming.why_left_out(loader)
        return "the run was asked to stop: leave the loop where accelerator.should_stop is True"

    def _tell_of_turns(self) -> None:
        self._in_turns = True
        if self.world.is_main:
            warnings.warn(
                "two prepared loaders are read in turns (zip, or next() on one inside the loop over the other), and "
                "the batch in hand is taken for that of the loader begun last. Where their last batches hold "
                "different numbers of samples, say which one is meant: gather_for_metrics(value, loader=...), and "
                "backward(loss_sum, weight=...)",
                stacklevel=2,
            )

    def times(self, loader: ShardedLoader) -> Mapping[str, float] | None:
        """For the loader's Progress."""
        return None if self.stopwatch is None else self.stopwatch.since_last()

    @contextmanager
    def unevenly(self) -> Iterator[None]:
        """A context in which ranks may run out of batches at different times."""
        self.uneven = True
        try:
            yield
        finally:
            self.uneven = False

    @property
    def loader(self) -> ShardedLoader | None:
        """The loader whose batch is in hand."""
        return self.loaders[-1] if self.loaders else None

    # Backward ----------------------------------------------------------------------------------------

    def simple_backward(self, loss: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """One process, nothing to weigh or to scale."""
        watch = self.stopwatch
        try:
            if watch is None:
                loss.backward(**kwargs)  # type: ignore[no-untyped-call]
            else:
                started = _clock()
                loss.backward(**kwargs)  # type: ignore[no-untyped-call]
                watch.backward += _clock() - started
        except (RuntimeError, AttributeError):
            # Looked at afterwards, so that it costs nothing: torch refuses before it computes.
            check_one_number(loss, kwargs)
            raise

    def backward(
        self, loss: torch.Tensor, weight: float | torch.Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Scaled by the window, by the scaler, timed.

        Raises:
            ConfigError: the loss is not one number.
        """
        check_one_number(loss, kwargs)
        if not self.window.open:
            self._step_outside()
        window = self.window
        if window.length > 1 and weight is None:
            window.dirty = True
        if weight is not None:
            if self.uneven and self._several:
                raise ConfigError(UNEVEN.format(rank=self.world.rank))
            loss = self._given_weights.weigh(
                loss, weight, window, self.windows.values(), filler=self._is_filler()
            )
        else:
            if window.weights is not None:
                raise ConfigError(EVERY_OR_NONE.format(rank=self.world.rank))
            if window.factor != 1.0:
                loss = loss * window.factor
        if self.scaling is not None:
            with self.scaling.scaled(loss) as scaled:
                self._differentiate(scaled, kwargs)
        elif self.stopwatch is None:
            self.strategy.backward(loss, window.models, kwargs)
        else:
            self._timed_backward(self.stopwatch, loss, kwargs)
        if weight is not None:
            self._given_weights.divide(window)
        elif window.owed != 1.0:
            window.check_alone(self.windows.values(), self.world.rank)
            self.strategy.scale_gradients(window.models, window.settle())
        if self._observer is not None:
            self._observer.backward()
        if not self.led and window.sync:
            self._tick_unled()

    def _step_outside(self) -> None:
        """For a backward in no micro-step: the window of all models, weighed by the batch in hand."""
        if self.length > 1 and self.window.begun:
            raise ConfigError(
                f"backward on rank {self.world.rank} stands outside the micro-steps of a run with "
                f"gradient_accumulation_steps={self.length}, and what it is a part of is not known. Put it into "
                "`with accelerator.accumulate(model):`, as those before it, or use accelerator.step(...)"
            )
        self.window = window = self.windows[()]
        window.factor = window.tail_factor(self.loader) if self._several else 1.0

    def pipeline_step(self, batch: Any) -> torch.Tensor:
        """Forward and backward of a batch through a pipeline; only the loss where gradients are off."""
        window, watch = self.window, self.stopwatch
        factor = window.tail_factor(self.loader)
        if watch is None:
            loss = self.strategy.pipeline_step(window.models, batch, factor)
        else:
            started, before = _clock(), watch.forward
            loss = self.strategy.pipeline_step(window.models, batch, factor)
            watch.backward += _clock() - started - (watch.forward - before)
        if torch.is_grad_enabled():
            if self._observer is not None:
                self._observer.backward()
            if not self.led:
                self._tick_unled()
        return loss

    def _differentiate(self, loss: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if self.stopwatch is None:
            self.strategy.backward(loss, self.window.models, kwargs)
        else:
            self._timed_backward(self.stopwatch, loss, kwargs)

    def _timed_backward(self, watch: Stopwatch, loss: torch.Tensor, kwargs: dict[str, Any]) -> None:
        communicates = self._several and self.window.sync and loss.requires_grad
        device = watch.device
        event = None if device is None else device.mark()
        started = _clock()
        watch.computed_at = 0.0
        if communicates:
            loss.register_hook(watch.on_backward_begins)  # type: ignore[no-untyped-call]
        self.strategy.backward(loss, self.window.models, kwargs)
        ended = _clock()
        computed = watch.computed_at or ended
        watch.backward += computed - started
        watch.communication += ended - computed
        if device is not None:
            device.add("backward", event)

    def _is_filler(self) -> bool:
        """Whether the batch in hand only keeps this rank's step like the others'."""
        loader = self.loader
        if loader is None or loader.even_batches:
            return False
        return loader.batch_samples == 0 and loader.batch_repeated > 0

    # The optimizer -----------------------------------------------------------------------------------

    def optimizer_step(self, prepared: Steppable, closure: Callable[[], Any] | None, *, leads: bool) -> Any:
        """A step with everything around it that is not free."""
        if self.length > 1 and not self.window.begun:
            raise ConfigError(
                f"gradient_accumulation_steps={self.length} needs `with accelerator.accumulate(model):` around "
                "the micro-step, or accelerator.step(...). A loop that accumulates by itself, with no_sync and a "
                "division of its own, leaves gradient_accumulation_steps out, and its factor in the loss"
            )
        self.between_passes = False
        watch = self.stopwatch
        device = self._device_clock
        event = None if device is None else device.mark()
        started = _clock()
        if self.scaling is None:
            result = prepared.optimizer.step() if closure is None else prepared.optimizer.step(closure)
            self.skipped = self.strategy.left_step_out(prepared.optimizer)
        else:
            prepared.ran = False
            result = self.scaling.step(prepared.optimizer, closure)
            self.skipped = not prepared.ran
        if watch is not None:
            watch.until = ended = _clock()
            watch.optimizer += ended - started
            if device is not None:
                device.add("optimizer", event)
        if leads:
            if not self.skipped:
                self.steps += 1
            if watch is not None:
                watch.step()
            if self._watched:
                self._tick()
        return result

    def _tick(self) -> None:
        self.trainers.stepped()
        if self._observer is not None and not self._observer.stepped():
            self.watch(None)
        if self.control is not None:
            self._tell(self.control, self.steps)

    def _tick_unled(self) -> None:
        """Where no optimizer is prepared, a backward that synchronises stands for a step: the ranks meet in
        it too. One process that prepares only a loader needs nobody, and its batches stand for steps."""
        if self.control is None:
            return
        self.trainers.stepped()
        self._unled_steps += 1
        self._tell(self.control, self._unled_steps)

    def _tell(self, control: Control, steps: int) -> None:
        control.tick(steps, self.loaders[-1].remeasured if self.loaders else 0)
        if control.interrupting and not self.loaders:  # else between two batches
            for model in self.models:
                for parameter in model.parameters():
                    parameter.grad = None  # the step has used it
            control.interrupt()

    def finish_scaler(self) -> None:
        """The scaler's pending update, so that its state can be saved."""
        if self.scaling is not None:
            self.scaling.update()


def _nothing(*_: Any) -> None:
    return None
