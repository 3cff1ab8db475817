"""Checks, in the first steps of a run, that ranks which should be equal are.

Every finding names ranks, parameter and likely cause. What the ranks must agree on is compared right
after `prepare` and after the optimizer steps 1 and 3; how many batches each has, at each batch of those
steps and at the end of that pass. It costs one pass over the parameters each time, and nothing afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, final
from zlib import crc32

import torch
from torch import Tensor, nn

from nbaccel.core.comm.collectives import gather_object
from nbaccel.core.comm.sideline import Sideline, Word
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.findings import (
    Facts,
    ModelFacts,
    Pass,
    compare,
    compare_models,
    describe_model,
    different_streams,
    fingerprint,
    same_inputs,
)
from nbaccel.core.loop.loop import Loop
from nbaccel.core.model.hooks import Hook
from nbaccel.core.nested import leaves
from nbaccel.errors import LeftLoopError, TrustError

__all__ = ["TrustChecks"]

_AFTER = (1, 3)  # optimizer steps after which ranks are compared
_IDLE = 64  # optimizer steps, and backwards, after which an optimizer that never stepped is named


@final
class TrustChecks:
    """Watches the first steps of a loop: it is the loop's `Observer`. Making one is collective."""

    def __init__(self, loop: Loop, unwrap: Callable[[nn.Module], nn.Module]) -> None:
        self._loop = loop
        self._unwrap = unwrap
        self._ticks = 0
        self._backwards = 0
        self._before: dict[nn.Module, ModelFacts] = {}
        self._passes: dict[str, int] = {}
        self._places: dict[Pass, list[tuple[int, int]]] = {}
        self._samples: dict[Pass, set[int]] = {}
        self._orders: dict[Pass, list[tuple[int, ...]]] = {}
        self._streams: dict[Pass, list[tuple[int, ...]]] = {}
        self._streams_differ = False
        self._inputs: list[int] = []
        self._prepared_loader = False
        self._optimizers: list[_Watched] = []
        self._hooks: list[Any] = []
        self._counts = _BatchCounts(loop) if loop.world.size > 1 else None
        self._regrouped = False

    # What is prepared --------------------------------------------------------------------------------

    def prepared_model(self, model: nn.Module) -> None:
        """Compares a model that was just spread over the ranks; called on all of them.

        Raises:
            TrustError: the ranks have different parameters or buffers.
        """
        inner = self._unwrap(model)
        if self._loop.world.size == 1 or self._ticks or model in self._loop.strategy.apart:
            return
        facts = self._before[inner] = describe_model(inner)
        told = gather_object(facts, world=self._loop.world)
        _raise(compare_models([[one] for one in told], "after prepare"))
        # Around whatever is compiled: a hook inside would have to be compiled again when it is taken off.
        self._hooks.append(model.register_forward_pre_hook(Hook(self._note_inputs), with_kwargs=True))

    def prepared_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes whether it steps at all, and which of its parameters get gradients."""
        self._optimizers.append(_Watched(optimizer))

    @property
    def ticks(self) -> int:
        """Optimizer steps it has seen."""
        return self._ticks

    def regroup(self, ticks: int | None) -> None:
        """Go on after so many steps, with none of what ranks saw that were stopped at different places; called on every
        rank. None: end."""
        for seen in (self._passes, self._places, self._samples, self._orders, self._streams, self._inputs):
            seen.clear()
        self._regrouped = True
        if ticks is None:
            self._loop.watch(None)
        elif self._counts is not None:
            self._counts = _BatchCounts(self._loop, self._counts.line)
        self._ticks = _AFTER[-1] if ticks is None else ticks
        if self._ticks >= _AFTER[-1]:
            self._remove_hooks()

    def forget(self) -> None:
        """What was prepared; what comes after it is compared as at first only where no steps were made yet."""
        self._remove_hooks()
        self._before.clear()
        self._optimizers.clear()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training or self._ticks >= _AFTER[-1] or self._loop.loader is not None:
            return
        tensors = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A constant says nothing: ones for a first try are the same everywhere.
        telling = [t for t in tensors if t.numel() > 1 and bool((t != t.reshape(-1)[0]).any())]
        self._inputs += [fingerprint(t) for t in telling]

    # What the loop tells -----------------------------------------------------------------------------

    def began(self, loader: ShardedLoader) -> None:
        """A pass begins."""
        self._passes[loader.name] = self._passes.get(loader.name, 0) + 1
        if self._counts is not None:
            self._counts.began(loader, self._ticks)

    def next_batch(self, loader: ShardedLoader) -> None:
        """The next batch is about to be taken; the one in hand is done with."""
        self._note_samples(loader)
        if self._counts is not None:
            self._counts.next_batch(loader, self._ticks)

    def ended(self, loader: ShardedLoader) -> None:
        """The pass is over."""
        self._note_samples(loader)
        if self._counts is not None:
            self._counts.ended(loader)

    def backward(self) -> None:
        """A backward is done."""
        self._backwards += 1
        if self._ticks == 0 and self._backwards == _IDLE * self._loop.length and self._optimizers:
            names = ", ".join(type(one.optimizer).__name__ for one in self._optimizers)
            skipped = " It was skipped each time because of fp16 overflows." if self._loop.skipped else ""
            directly = any(one.steps for one in self._optimizers)
            cause = (
                "the optimizer given to prepare is stepped itself; step what prepare returned"
                if directly
                else "optimizer.step() is not reached, or is that of another optimizer"
            )
            self._warn(f"{self._backwards} backwards and no step of {names}.{skipped} Likely cause: {cause}.")

    def stepped(self) -> bool:
        """Compares the ranks after certain optimizer steps; whether there is more to watch.

        Raises:
            TrustError: ranks differ where they must be equal; the same on every rank.
        """
        self._ticks += 1
        loader = self._loop.loader
        if loader is not None:
            self._prepared_loader = True
            self._note_samples(loader)
        if self._ticks in _AFTER:
            before = " and an interrupt at another step on each rank" if self._regrouped else ""
            self._compare(f"after optimizer step {self._ticks}{before}")
        if self._ticks == _AFTER[-1]:
            self._tell_unused()
            self._remove_hooks()
        if self._ticks == _IDLE:
            self._tell_idle()
        return self._ticks < _IDLE or (self._counts is not None and self._counts.watching)

    # Comparing ---------------------------------------------------------------------------------------

    def _note_samples(self, loader: ShardedLoader) -> None:
        key, place = (loader.name, self._passes.get(loader.name, 0)), (loader.epoch, loader.position)
        places = self._places.setdefault(key, [])
        if self._ticks > _AFTER[-1] or not _in_hand(loader) or place in places[-1:]:
            return
        if loader.state_scope == "global":
            places.append(place)
        if loader.global_batch_digests:
            self._streams.setdefault(key, []).append(loader.global_batch_digests)
        drawn, indices = loader.global_batch_indices, loader.batch_indices
        if drawn is not None:
            # Not hash(): that of a string is another one in every process.
            numbers = tuple(one if isinstance(one, int) else crc32(repr(one).encode()) for one in drawn)
            self._orders.setdefault(key, []).append(numbers)
        elif indices is not None and not loader.with_replacement:
            listed = indices.tolist() if isinstance(indices, Tensor) else list(indices)
            self._samples.setdefault(key, set()).update(listed)

    def _compare(self, when: str) -> None:
        if self._loop.world.size == 1:
            return
        apart = self._loop.strategy.apart  # training on their own for a while, so not equal
        models = [self._unwrap(model) for model in self._loop.models if model not in apart]
        first = self._has_own_data()
        mine = Facts(
            models=[describe_model(model, self._before.get(model)) for model in models],
            places=self._places,
            samples={key: sorted(seen) for key, seen in self._samples.items()} if first else {},
            orders=self._orders,
            streams=self._streams,
            inputs=self._inputs if first else [],
            prepared_loader=self._prepared_loader,
        )
        told = gather_object(mine, world=self._loop.world)
        _raise(compare(told, when))
        if not self._streams_differ and (doubt := different_streams(told)):
            self._streams_differ = True
            self._warn(doubt)
        if self._ticks == _AFTER[-1] and (doubt := same_inputs(told)):
            self._warn(doubt)

    def _has_own_data(self) -> bool:
        """Whether no rank before this one reads the same samples by design, as those that share a model do."""
        world, axis = self._loop.world, self._loop.strategy.data_axis
        return world.rank % (world.size // axis.size) == 0

    def _tell_unused(self) -> None:
        names = {
            p: name
            for model in self._loop.models
            for name, p in self._unwrap(model).named_parameters()
            if p.requires_grad
        }
        unused = [names[p] for one in self._optimizers for p in one.unused() if p in names]
        if unused:
            self._warn(
                f"{len(unused)} parameters got no gradient in {self._ticks} optimizer steps, on all ranks: "
                f"{', '.join(unused[:5])}. Likely cause: they are not used in forward, or their output does "
                "not reach the loss."
            )

    def _tell_idle(self) -> None:
        idle = [one for one in self._optimizers if not one.steps]
        for one in self._optimizers:
            one.close()
        self._optimizers.clear()
        if idle and not self._loop.skipped:
            kinds = ", ".join(type(one.optimizer).__name__ for one in idle)
            self._warn(
                f"{kinds}: prepared, and not stepped once in {self._ticks} optimizer steps of the first. Likely "
                "cause: its step() is missing, or another optimizer is stepped in its place."
            )

    def _warn(self, text: str) -> None:
        if self._loop.world.is_main:
            warnings.warn(text, stacklevel=4)


def _in_hand(loader: ShardedLoader) -> bool:
    return loader.batch_samples + loader.batch_repeated > 0


def _raise(found: list[str]) -> None:
    if found:
        raise TrustError("\n".join(found))


@final
class _Watched:
    """An optimizer, the steps it really made, and its parameters that never had a gradient then."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self._bare: list[nn.Parameter] | None = None
        self._hook: Any = optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps <= _AFTER[-1]:
            held = self._bare
            if held is None:
                held = [p for group in optimizer.param_groups for p in group["params"]]
            self._bare = [p for p in held if p.requires_grad and p.grad is None]

    def unused(self) -> list[nn.Parameter]:
        """Its parameters that had no gradient in any of its steps."""
        return self._bare or []

    def close(self) -> None:
        """Stops watching."""
        self._hook.remove()


@final
class _BatchCounts:
    """Compares how many batches each rank takes in the first pass that trains.

    In the first steps every rank waits, before each batch, for the others to say that they go on; later
    each says how the pass ended, and looks at the others' words when they have come. On a group of its
    own: a rank that has left must not meet the training's collectives.
    """

    GOES_ON, AT_END, LEFT = range(3)

    def __init__(self, loop: Loop, line: Sideline | None = None) -> None:
        self._loop = loop
        self.line = line if line is not None and line.stands else Sideline()
        self._loader: ShardedLoader | None = None
        self._taken: dict[ShardedLoader, int] = {}
        self._said: tuple[Word, Tensor] | None = None
        self._open = True

    @property
    def watching(self) -> bool:
        """Whether that pass is not over yet on every rank."""
        return self._open or self._said is not None

    def began(self, loader: ShardedLoader, ticks: int) -> None:
        """A pass begins; in the first steps a rank that left one waits for what the others did.

        Raises:
            TrustError: they did not leave it.
        """
        self._taken[loader] = 0
        self._look(wait=ticks < _AFTER[-1])

    def next_batch(self, loader: ShardedLoader, ticks: int) -> None:
        """Before a batch of the pass: all ranks go on, or none does.

        Raises:
            TrustError: some have no more.
        """
        taken = self._taken.get(loader, 0)
        self._taken[loader] = taken + 1
        self._look(wait=False)
        if not self._trains(loader) or not self._going():
            return
        if ticks < _AFTER[-1]:
            self._say(taken, self.AT_END if loader.at_end else self.GOES_ON)
            self._look(wait=True)
        elif loader.at_end:
            self._say(taken, self.AT_END)
        self._open = not loader.at_end

    def ended(self, loader: ShardedLoader) -> None:
        """The pass is over; if before its end, the others hear of it."""
        if self._trains(loader) and self._going():
            self._say(self._taken[loader], self.LEFT)
            self._open = False

    def _look(self, *, wait: bool) -> None:
        if self._said is None or not (wait or self._said[0].has_come()):
            return
        word, table = self._said
        come = word.wait()
        self._said = None
        if not come:
            return
        rows = [tuple(row) for row in table.tolist()]
        if len(set(rows)) > 1:
            words = ("goes on", "is at the end", "has left the loop")
            told = "; ".join(
                f"rank {r} {words[code]} after {batches} batches" for r, (batches, code) in enumerate(rows)
            )
            assert self._loader is not None
            kind = LeftLoopError if any(code == self.LEFT for _, code in rows) else TrustError
            raise kind(
                f"the ranks take unequal numbers of batches from {self._loader.name!r}: {told}. Likely cause: "
                "data that divides itself unequally (shard='none'), a break under a branch on the rank, or an "
                "error in its loop, which is then told as well. "
                "Ranks that run out in turn need join_uneven_inputs."
            )

    def _trains(self, loader: ShardedLoader) -> bool:
        if self._loader is None and loader in self._loop.trainers:
            self._loader = loader
        return loader is self._loader

    def _going(self) -> bool:
        self._open = self._open and not self._loop.uneven
        return self._open

    def _say(self, taken: int, code: int) -> None:
        mine = torch.tensor([taken, code])
        table = torch.zeros(self._loop.world.size, 2, dtype=torch.int64)
        self._said = self.line.start_gather(table, mine), table
