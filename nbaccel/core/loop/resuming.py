"""A resumed run's way through what it has behind it: the loop is written as for a fresh run, and its passes over the
loaders, and the schedulers' steps after them, are left out until a loader goes on for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from nbaccel.core.data import ShardedLoader
from nbaccel.errors import CheckpointError

__all__ = ["Resuming"]

_SAME = (
    "kind",
    "total",
    "shuffle",
    "per_rank",
)  # of a loader's state: what does not change from pass to pass


@final
class Resuming:
    """Which passes are left out, and whether a scheduler's step counts."""

    def __init__(self) -> None:
        self.active = False
        """Whether the run is in, or after, a pass that is left out, until the next one begins."""
        self.awaited: dict[int, Mapping[str, Any]] = {}
        """By number: the states of loaders that the run had prepared when it was saved, and has not again yet."""
        self._loaders: Sequence[ShardedLoader] = ()
        """All that are prepared; the list grows."""
        self._left: dict[ShardedLoader, tuple[int, Mapping[str, Any]]] = {}
        """Passes to leave out, and where the loader then goes on."""
        self._through: set[ShardedLoader] = set()
        """Those that have left out all."""
        self._due: int | None = None
        """The number of the loader after whose last pass a scheduler's step was still to come when the checkpoint was
        saved."""
        self._saved_in: int | None = None
        """The number of the loader in whose pass, the outermost one, it was saved."""
        self._around: ShardedLoader | None = None
        """The loader of the outermost pass."""
        self._trained: ShardedLoader | None = None
        """The loader in whose pass the optimizer has stepped last."""
        self._scheduled_at = -1  # optimizer steps when a scheduler stepped last
        self._steps_before = 0  # and when that pass began
        self._set: tuple[ShardedLoader, int, Mapping[str, Any]] | None = None
        """The last pass that began where it was set to: its loader, the optimizer steps then, and the place."""

    def __bool__(self) -> bool:
        """Whether passes are still to be left out."""
        return bool(self._left)

    def resume(self, loaders: Sequence[ShardedLoader], awaited: Mapping[int, Mapping[str, Any]]) -> None:
        """The loaders have just been given their states.

        Args:
            loaders: all that are prepared, in a list that grows.
            awaited: the states of those still to come, by their place in it.
        """
        self._loaders, self.awaited = loaders, dict(awaited)
        for loader in loaders:
            self._leave_out(loader)

    def _leave_out(self, loader: ShardedLoader) -> None:
        """The passes that a loader's state, just loaded, has behind it."""
        if loader.epoch:
            self._left[loader] = (loader.epoch, loader.state_dict())

    def leaves_out(self, loader: ShardedLoader) -> bool:
        """Whether its pass gives no batches."""
        return loader in self._left

    def why_left_out(self, loader: ShardedLoader) -> str:
        """What a `next()` on a pass that is left out tells whoever did not expect it to end."""
        more = self._left[loader][0] - 1
        return (
            f"this pass over {loader.name!r} gives no batch: resume= has put it behind the run"
            f"{f', and {more} more' if more else ''}. resume= is for loops with one `for` over the loader per epoch, "
            "or with batches from a generator of `while True: yield from loader`. To look at a batch before the loop "
            "take it from the DataLoader that was given to prepare. In any other loop leave resume= out and call "
            "accelerator.load_state() after prepare: the next pass then goes on where the run stood."
        )

    def began(self, loader: ShardedLoader, steps: int, *, outermost: bool, counts: bool) -> None:
        """A pass begins, after so many optimizer steps.

        Args:
            counts: whether all that was trained on is in these steps.

        Raises:
            CheckpointError: the loader, prepared since, is not the one that was saved.
        """
        if outermost:
            self._around, self._steps_before = loader, steps
        self._take_place(loader)
        if loader in self._through or self._trains(steps):
            self._go_on()
        self.active = loader in self._left
        if counts:
            self._give_back(loader, steps)

    def regroup(self) -> None:
        """Ranks have joined, which do not know what was looked at."""
        self._set = None

    def _give_back(self, loader: ShardedLoader, steps: int) -> None:
        """Sets the loader again to where it was resumed, if batches were only looked at since: `next(iter(loader))`
        before the loop is a pass too."""
        if self._set is not None and self._set[0] is loader:
            _, before, state = self._set
            left_early = loader.epoch == state["epoch"] != loader.next_epoch
            if before == steps and left_early:
                taken = loader.position - state["samples"]
                loader.load_state_dict(state)
                if taken and loader.world.is_main:
                    print(
                        f"loader {loader.name!r} goes on from its resumed place: the {taken} sample(s) taken from it "
                        "before this loop were given to no optimizer step",
                        flush=True,
                    )
            self._set = None
        if loader.resumes and not self.active:
            self._set = loader, steps, loader.state_dict()

    def _trains(self, steps: int) -> bool:
        """Whether the pass that the checkpoint was saved in goes on, and has made steps."""
        return steps != self._steps_before and self._number(self._around) == self._saved_in is not None

    def _number(self, loader: ShardedLoader | None) -> int | None:
        return self._loaders.index(loader) if loader in self._loaders else None

    def _go_on(self) -> None:
        """For real: whatever passes the code has left out of other loaders meanwhile are behind."""
        self._through.clear()
        self.awaited.clear()
        for loader, (_, state) in self._left.items():
            loader.load_state_dict(state)
        self._left.clear()

    def _take_place(self, loader: ShardedLoader) -> None:
        """Lets a loader that was prepared after the others had been given their states go on from its own."""
        number = self._number(loader)
        if number is None or number not in self.awaited:
            return
        state, here = self.awaited.pop(number), loader.state_dict()
        for name in _SAME:
            # Its place is known by its number only: another loader would leave out passes of its own.
            if state[name] != here[name]:
                raise CheckpointError(
                    f"loader {loader.name!r} on rank {loader.world.rank} is number {number + 1} of those prepared, and "
                    f"is not the one that was saved: its {name} is {here[name]!r} and was {state[name]!r}. Prepare "
                    "the same loaders in the same order, also in passes that a resumed run leaves out: before "
                    "`if accelerator.fast_forwarding: continue`."
                )
        loader.load_state_dict(state)
        self._leave_out(loader)

    def ended(self, loader: ShardedLoader, steps: int, *, outermost: bool) -> None:
        """The pass is over."""
        if outermost and steps != self._steps_before:
            self._trained = loader
            if self._trains(steps):
                self._go_on()
        passes, state = self._left.pop(loader, (0, {}))
        if passes > 0:
            loader.load_state_dict(state)
            if passes > 1:
                self._left[loader] = (passes - 1, state)
            else:
                self._through.add(loader)

    def may_schedule(self, steps: int) -> bool:
        """Whether a scheduler's step counts; those after the passes behind have been made."""
        if self.active and self._due not in map(self._number, self._through):
            return False
        self._scheduled_at = steps
        return True

    def place(
        self, loaders: Sequence[ShardedLoader], passes: Sequence[ShardedLoader], steps: int
    ) -> dict[str, Any]:
        """For a checkpoint: the loader in whose pass it is saved; between two passes the one after whose pass a
        scheduler has not stepped yet.

        Args:
            loaders: all that are prepared.
            passes: those that are being iterated, the outermost first.
        """
        due = self._trained if not passes and self._scheduled_at != steps else None
        around = passes[0] if passes else None
        return {
            "schedule_due_after": loaders.index(due) if due in loaders else None,
            "saved_in": loaders.index(around) if around in loaders else None,
        }

    def load_place(self, state: Mapping[str, Any]) -> None:
        """What `place` has told the checkpoint."""
        self._due, self._saved_in = state.get("schedule_due_after"), state.get("saved_in")
