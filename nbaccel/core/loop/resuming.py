"""A resumed run's way through what it has behind it: the loop is written as for a fresh run, and its passes over the
loaders, and the schedulers' steps after them, are left out until a loader goes on for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.looks import Looks
from nbaccel.errors import CheckpointError

__all__ = ["Resuming"]

_SAME = (
    "kind",
    "total",
    "shuffle",
    "per_rank",
)  # of a loader's state: what does not change from pass to pass

_PASSED = -1  # no number of steps


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
        self._set: tuple[ShardedLoader, int, Mapping[str, Any], int] | None = None
        """The last pass that began where it was set to: its loader, the optimizer steps then, the place, and how many
        samples were taken before it was left."""
        self._begun: dict[ShardedLoader, int | None] = {}
        """Optimizer steps when the pass in progress began; None where they do not tell whether it trains."""
        self._spent: set[ShardedLoader] = set()
        """Those whose last pass was left without a step, as an evaluation of some batches: the next one is of the next
        epoch, in a resumed run too."""
        self._loaded_spent: set[int] = set()
        """Those that the checkpoint tells of, by the loader's number."""
        self._looks: dict[ShardedLoader, Looks] = {}
        self._loaded_looks: dict[int, Looks] = {}
        """Those that the checkpoint tells of, by the loader's number."""
        self._loaded_at: int | None = None
        """Optimizer steps of the checkpoint that was loaded, until its place is passed."""
        self._shown: dict[ShardedLoader, tuple[int, int]] = {}
        """How many looks this process has made in an epoch, the last one with any."""

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
        self._looks[loader] = self._loaded_looks.pop(self._loaders.index(loader), Looks())
        if loader.epoch:
            self._left[loader] = (loader.epoch, loader.state_dict())

    def settle(self, loaders: Sequence[ShardedLoader]) -> None:
        """The loaders have been given the states of a checkpoint, whose `place` is loaded."""
        for number in self._loaded_spent.intersection(range(len(loaders))):
            self._settle(number, loaders[number])

    def _settle(self, number: int, loader: ShardedLoader) -> None:
        if number in self._loaded_spent:
            self._loaded_spent.remove(number)
            loader.set_epoch(loader.epoch + 1)

    def _behind(self, loader: ShardedLoader) -> int:
        """The epoch that is left out."""
        passes, state = self._left[loader]
        return int(state["epoch"]) - passes

    def _shows(self, loader: ShardedLoader) -> bool:
        """Whether the pass that is left out gives its first batch again."""
        if loader not in self._left or loader not in self._looks:
            return False
        epoch = self._behind(loader)
        return self._looks[loader].has(epoch, self._shown_in(loader, epoch))

    def _shown_in(self, loader: ShardedLoader, epoch: int) -> int:
        shown = self._shown.get(loader, (epoch, 0))
        return shown[1] if shown[0] == epoch else 0

    def leaves_out(self, loader: ShardedLoader, steps: int) -> bool:
        """Whether its pass gives no batch, or no more.

        Args:
            steps: optimizer steps so far.

        Raises:
            CheckpointError: the loop has trained with a batch that the run before only looked at.
        """
        if loader not in self._left:
            return False
        if not self._shows(loader):
            return True
        begun = self._begun[loader]
        if begun is not None and steps != begun:
            raise CheckpointError(
                f"rank {loader.world.rank} has made an optimizer step in a pass over {loader.name!r} of which the run "
                "that was saved only looked at a batch, as next(iter(loader)) does. A loop that is resumed makes the "
                "same passes: put the look back, or leave resume= out and call accelerator.load_state() after prepare"
            )
        return loader.pass_entries[0] > 0

    def why_left_out(self, loader: ShardedLoader) -> str:
        """What a `next()` on a pass that is left out tells whoever did not expect it to end."""
        more = self._left[loader][0] - 1
        return (
            f"this pass over {loader.name!r} gives no batch: resume= has put it behind the run"
            f"{f', and {more} more' if more else ''}. resume= is for loops with one `for` over the loader per epoch, "
            "or with batches from a generator of `while True: yield from loader`. What stands after that `for` is left "
            "out in an epoch that is behind by `if accelerator.fast_forwarding: continue`. To look at a batch where "
            "the run did not when it was saved, take it from the DataLoader that was given to prepare. In any other "
            "loop leave resume= out and call accelerator.load_state() after prepare: the next pass then goes on where "
            "the run stood."
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
        self._begun[loader] = steps if counts else None
        self._spent.discard(loader)
        self.active = loader in self._left
        if counts:
            self._give_back(loader, steps)
        if self._shows(loader):
            loader.set_epoch(self._behind(loader))
        elif not self.active and loader in self._looks:
            self._looks[loader].begin(loader.next_epoch)

    def regroup(self) -> None:
        """Ranks have joined, which do not know what was looked at; and what was interrupted was no look."""
        self._set = None
        self._looks.clear()
        self._spent.clear()

    def _give_back(self, loader: ShardedLoader, steps: int) -> None:
        """Sets the loader again to where it was resumed, if batches were only looked at since: `next(iter(loader))`
        before the loop is a pass too."""
        if self._set is not None and self._set[0] is loader:
            _, before, state, taken = self._set
            # the loop may have set the epoch again
            if taken and before == steps and loader.next_epoch - state["epoch"] in (0, 1):
                loader.load_state_dict(state)
                if loader.world.is_main:
                    print(
                        f"loader {loader.name!r} goes on from its resumed place: the {taken} sample(s) taken from it "
                        "before this loop were given to no optimizer step",
                        flush=True,
                    )
            self._set = None
        if loader.resumes and not self.active and self._loaded_at in (None, steps):
            self._set = loader, steps, loader.state_dict(), 0

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
        self._loaded_at = _PASSED

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
        self._settle(number, loader)
        self._leave_out(loader)

    def ended(self, loader: ShardedLoader, steps: int, *, outermost: bool) -> None:
        """The pass is over."""
        if outermost and steps != self._steps_before:
            self._trained = loader
            if self._trains(steps):
                self._go_on()
        elif outermost and self._is_through(loader):
            self._go_on()
        begun = self._begun.pop(loader, None)
        if loader in self._left:
            self._leave_behind(loader)
        elif loader.next_epoch != loader.epoch and begun == steps:
            self._note_left(loader)

    def _note_left(self, loader: ShardedLoader) -> None:
        """A pass was left early, and no step was made in it."""
        if self._set is not None and self._set[0] is loader:
            self._set = (*self._set[:3], loader.position - self._set[2]["samples"])
        else:
            self._spent.add(loader)
        if 0 < loader.batch_samples + loader.batch_repeated == loader.pass_entries[0]:  # after one batch
            looks, shown = self._looks.setdefault(loader, Looks()), self._shown_in(loader, loader.epoch)
            if not looks.has(loader.epoch, shown):  # else the run before has made it at this place
                looks.add(loader.epoch)
            self._shown[loader] = loader.epoch, shown + 1

    def _is_through(self, loader: ShardedLoader) -> bool:
        """Whether the pass that the checkpoint was saved in is over; if that was at its last batch, without a step."""
        saved_in = loader not in self._left and self._number(loader) == self._saved_in is not None
        return saved_in and loader.next_epoch == loader.epoch

    def _leave_behind(self, loader: ShardedLoader) -> None:
        """A pass that is left out is over."""
        (passes, state), epoch = self._left[loader], self._behind(loader)
        shown = self._shown_in(loader, epoch) + 1
        self._shown[loader] = epoch, shown
        loader.load_state_dict(state)
        if self._looks_remain(loader, epoch, shown):
            return
        if passes > 1:
            self._left[loader] = (passes - 1, state)
        else:
            del self._left[loader]
            self._through.add(loader)

    def _looks_remain(self, loader: ShardedLoader, epoch: int, shown: int) -> bool:
        """Whether the epoch has more passes, after `shown` of them."""
        looks = self._looks.get(loader)
        return looks is not None and looks.has(epoch, shown - 1) and not looks.are_all(epoch, shown)

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
        looks = {loaders.index(one): looks for one, looks in self._looks.items() if one in loaders}
        return {
            "looks": {str(number): one.tell() for number, one in (self._loaded_looks | looks).items()},
            "schedule_due_after": loaders.index(due) if due in loaders else None,
            "saved_in": loaders.index(around) if around in loaders else None,
            "spent": [number for number, one in enumerate(loaders) if one in self._spent],
        }

    def load_place(self, state: Mapping[str, Any]) -> None:
        """What `place` has told the checkpoint, and its optimizer `steps`."""
        self._due, self._saved_in = state.get("schedule_due_after"), state.get("saved_in")
        self._loaded_at, self._loaded_spent = state["steps"], set(state.get("spent", ()))
        self._loaded_looks = {int(number): Looks(told) for number, told in state.get("looks", {}).items()}
