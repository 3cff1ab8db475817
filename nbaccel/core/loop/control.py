"""Stop and save requests, turned knobs and interrupts, acted upon at the same optimizer step on every rank.

Requests reach ranks at different moments. So at an optimizer step each rank starts an asynchronous
reduction of what it has heard, on a group of its own, and reads the result at a later one that all
derive from the same numbers:

    step      s          s+1 … s+k-1      s+k                       k: about 50 ms of steps, from the
    rank 0    start -------------------->  read, start, …              slowest rank's step time, which
    rank 1    start -------------------->  read, start, …              travels in the reduction too

By the time it is read it is done, because to get there the ranks' gradients had to meet: nobody waits
for it. Nothing is exchanged in one process. Values of knobs are rank 0's: the reduction says that there
are some, and they follow at once.

A stop is for the call of a session that it was asked in. After an interrupt, which leaves ranks at different steps,
they begin to count anew.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

import torch
import torch.distributed as dist

from nbaccel.core.comm.frames import exchange_objects
from nbaccel.core.comm.sideline import Sideline, Word
from nbaccel.core.loop.knobs import Knobs
from nbaccel.core.world import World
from nbaccel.errors import TrustError
from nbaccel.wire import events, occasions

__all__ = ["Choices", "Control", "tell_choices"]

_INTERVAL = 0.05  # seconds between two exchanges
_MOST_STEPS = 256
_ECHO = 2.0  # seconds in which a rank's own copy of a request already acted upon may still arrive
_FLAGS = 6  # stop, save, seconds per step, knobs, and a length of data with both signs: the largest and the smallest
_INTERRUPT = 2.0  # where 1.0 is a stop

# One line per default process group, made once: it lives as long as that group does.
_lines: weakref.WeakKeyDictionary[dist.ProcessGroup, Sideline] = weakref.WeakKeyDictionary()


def _line_of(world: World, agreed: str) -> Sideline:
    """The line of the default group; ranks that left an earlier loop unevenly are brought in step first."""
    default = dist.group.WORLD
    assert default is not None
    line = _lines.get(default)
    if line is None:
        line = _lines[default] = Sideline()
    counts = exchange_objects("Accelerator", line.started, world=world, signature=agreed)
    while line.started < max(counts):
        line.start_max(torch.zeros(_FLAGS, dtype=torch.float64)).wait()
    return line


Choices = Callable[[], Mapping[str, str]]
"""Gives what the run's options came to, by option: a planner chooses late."""


def tell_choices(chosen: Choices) -> None:
    """Tell whoever watches what the run's options came to: who knows of a loop offers to stop it."""
    for option, value in chosen().items():
        events.emit(events.Applied(option=option, value=value))


@final
class Control:
    """What the ranks have agreed on: `stopping`, `saving`, the values of `knobs`.

    Making one is collective. `agreed` describes what must be equal on all ranks.

    Args:
        knobs: told of new values.
        stop_after: seconds from now after which all ranks stop.
        save_every: optimizer steps (int) or seconds (float) between saves.
        save_on_stop: a stop asks for a save too.
        chosen: told again with the first step of a session's later call.
    """

    def __init__(
        self,
        world: World,
        knobs: Knobs,
        *,
        stop_after: float | None = None,
        save_every: int | float | None = None,
        save_on_stop: bool = False,
        agreed: str = "",
        chosen: Choices = dict,
    ) -> None:
        self.stopping = False
        """All ranks leave their loops after this optimizer step, in this call."""
        self.stopped_early = False
        """They did so in the latest call that made steps."""
        self.saving = False
        """All ranks save after this optimizer step."""
        self.interrupting = False
        """All ranks are to `interrupt` behind this optimizer step, at one place."""
        self._line = _line_of(world, agreed) if world.size > 1 else None
        self._world, self._agreed, self._knobs = world, agreed, knobs
        self._save_on_stop = save_on_stop
        now = time.monotonic()
        self._deadline = None if stop_after is None else now + stop_after
        self._save_steps = save_every if isinstance(save_every, int) else None
        self._save_seconds = save_every if isinstance(save_every, float) else None
        self._saved_at = now
        self._want_stop = self._want_save = self._save_asked = self._want_interrupt = False
        self._turned: list[tuple[str, Any]] = []
        self._travelling: list[tuple[str, Any]] = []
        self._deaf_until = 0.0
        self._word: Word | None = None
        self._flags = torch.zeros(_FLAGS, dtype=torch.float64)
        self._due = self._ticks = 0
        self._started_at, self._started_tick = now, 0
        self._behind, self._chosen, self._anew = 0, chosen, False
        occasions.at_call_begin(self._begin_anew)

    def tick(self, step: int, length: int = 0) -> None:
        """An optimizer step, the `step`-th (from 1), has been made. Called on every rank.

        Args:
            length: samples of its data, where they are not those that the ranks compared when it was prepared.

        Raises:
            TrustError: they are others on another rank; raised on all at the same step, if a later one.
        """
        self._ticks += 1
        if self._anew:
            self._anew = self.stopped_early = False
            tell_choices(self._chosen)
        if self._save_steps is not None and (step + self._behind) % self._save_steps == 0:
            self.saving = True
        self._listen()
        if self._line is None:
            self.interrupting |= self._want_interrupt
            self._want_interrupt = False
            if self._want_stop and not self.stopping:
                self._stop(step)
            self.saving |= self._want_save
            self._want_save = False
            if self._turned:
                self._knobs.turn(self._turned, step)
                self._turned = []
        elif self._ticks >= self._due and not self.stopping:
            self._exchange(self._line, step, length)

    def _begin_anew(self) -> None:
        """The rank begins another call: what was asked of the last one is over."""
        self.stopping = self.saving = self.interrupting = False
        self._want_stop = self._want_save = self._want_interrupt = False
        self._started_at, self._started_tick = time.monotonic(), self._ticks
        self._anew = True

    def regroup(self, behind: int) -> None:
        """Begin to count anew, whatever each rank had told and heard when it was interrupted; called on every rank.

        Args:
            behind: optimizer steps that this rank has made less than another.
        """
        self._behind = behind
        self._due = self._ticks = 0
        self._started_tick = 0
        if self._line is not None:
            self._line = _line_of(self._world, self._agreed)
        if self._word is not None:
            self._forget_word()

    def _forget_word(self) -> None:
        """It tells nothing; what this rank said in it is said again."""
        self._word = None
        self._turned[:0] = self._travelling

    def _stop(self, step: int) -> None:
        self.stopping = self.stopped_early = True
        events.emit(events.Halted(step=step))
        self.saving |= self._save_on_stop

    def interrupt(self) -> NoReturn:
        """Raise KeyboardInterrupt, as all ranks do here."""
        self.interrupting = False
        raise KeyboardInterrupt

    def saved(self) -> bool:
        """A save asked for by `saving` has been made; whether a person waits for it."""
        self.saving = False
        self._saved_at = time.monotonic()
        asked, self._save_asked = self._save_asked, False
        return asked

    def _listen(self) -> None:
        for request in events.requests():
            if request.kind == "stop":
                self._want_stop = True
            elif request.kind == "interrupt":
                self._want_interrupt = True
            elif request.kind == "save" and time.monotonic() >= self._deaf_until:
                self._want_save = self._save_asked = True
            elif request.kind == "knob" and self._world.is_main:
                self._turned.append((request.name, request.value))
        if self._deadline is None and self._save_seconds is None:
            return
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._want_stop = True
        if self._save_seconds is not None and now - self._saved_at >= self._save_seconds:
            self._want_save = True

    def _exchange(self, line: Sideline, step: int, length: int) -> None:
        if self._word is not None and not self._word.wait():
            self._forget_word()
        elif self._word is not None:
            stop, save, seconds, turned, longest, shortest = self._flags.tolist()
            if longest + shortest > 0:
                self._word = None
                raise TrustError(
                    "the data set that is trained on has grown or shrunk on some ranks only: on rank "
                    f"{self._world.rank} it {f'has {length} samples' if length else 'is as it was prepared'}. "
                    "The ranks divide it, so samples are used twice or never. Change it between two passes, alike on "
                    "all ranks."
                )
            if stop == _INTERRUPT:
                self.interrupting, self._want_interrupt = True, False
            elif stop > 0:
                self._stop(step)
            if save > 0:
                self.saving, self._want_save = True, False
                self._deaf_until, self._saved_at = time.monotonic() + _ECHO, time.monotonic()
            if turned > 0:
                self._knobs.turn(line.share(self._travelling), step)
            self._due = self._ticks + max(1, min(_MOST_STEPS, int(_INTERVAL / max(seconds, 1e-9))))
        if self.stopping:
            self._word = None
            return
        now = time.monotonic()
        pace = (now - self._started_at) / max(1, self._ticks - self._started_tick)
        self._started_at, self._started_tick = now, self._ticks
        self._travelling, self._turned = self._turned, []
        stop = _INTERRUPT if self._want_interrupt else self._want_stop
        wanted = [stop, self._want_save, pace, bool(self._travelling), length, -length]
        self._flags = torch.tensor(wanted, dtype=torch.float64)
        self._word = line.start_max(self._flags)
