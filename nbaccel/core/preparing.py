"""What `prepare` does with models, optimizers, loaders and schedulers; remembers what it has prepared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.utils.data import DataLoader

from nbaccel.core.comm.collectives import gather_object
from nbaccel.core.comm.frames import digest
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.trust import TrustChecks
from nbaccel.core.loop.wrappers import (
    PreparedOptimizer,
    PreparedScheduler,
    is_scheduler,
    patch_forward,
    restore_forward,
)
from nbaccel.core.model import compiling
from nbaccel.core.nested import leaves, map_leaves
from nbaccel.core.precision import Precision, choose_precision, probe_hardware
from nbaccel.core.saving import Saving
from nbaccel.core.world import World
from nbaccel.errors import ConfigError, TrustError

__all__ = ["Chooser", "Preparing"]


class Chooser(Protocol):
    """What decides how models are spread when it has seen them."""

    def consider(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        loaders: Sequence[DataLoader[Any]],
    ) -> None:
        """Told of all that a call brings, before any of it is wrapped."""


@final
class Preparing:
    """Makes objects ready, each once, and hands them to the loop and to saving.

    Args:
        place: move models and batches to the device.
        compile: compile models: True or a mode of torch.compile.
        loader_options: of `ShardedLoader`.
        scheduler_follows: schedulers step with the optimizer only.
        scheduler_repeat: scheduler steps per optimizer step.
        trust: told of what is prepared.
        chooser: None where the strategy is decided.
    """

    def __init__(
        self,
        loop: Loop,
        saving: Saving,
        precision: Precision,
        *,
        place: bool,
        compile: bool | str | None,
        loader_options: Mapping[str, Any],
        scheduler_follows: bool,
        scheduler_repeat: int,
        trust: TrustChecks | None,
        chooser: Chooser | None,
    ) -> None:
        self._loop, self._saving, self._precision, self._trust = loop, saving, precision, trust
        self._chooser = chooser
        self._device = loop.world.device
        self._plain = choose_precision("no", probe_hardware(self._device), speak=False)
        self._place, self._compile = place, compile
        self._loader_options = loader_options
        self._scheduler_follows, self._scheduler_repeat = scheduler_follows, scheduler_repeat
        self._prepared: dict[int, tuple[Any, Any]] = {}
        self._stepped: dict[int, torch.optim.Optimizer] = {}
        """What the strategy gave to step for an optimizer that came with its model, by the latter's id."""

    def all(self, objects: Sequence[Any], places: Sequence[bool | None] | None) -> Any:
        """See `Accelerator.prepare`."""
        if not objects:
            raise ConfigError(
                "prepare() was given nothing; give models, optimizers, DataLoaders or schedulers"
            )
        places = places or [None] * len(objects)
        if len(places) != len(objects):
            raise ConfigError(f"device_placement has {len(places)} values for {len(objects)} objects")
        self._models_first(objects, places)
        done = [
            map_leaves(partial(self._one, place=place), one)
            for one, place in zip(objects, places, strict=True)
        ]
        return done[0] if len(done) == 1 else tuple(done)

    def _models_first(self, objects: Sequence[Any], places: Sequence[bool | None]) -> None:
        """Wraps the models, each with the optimizers of its parameters: wrapping may replace these."""
        given = [(leaf, place) for one, place in zip(objects, places, strict=True) for _, leaf in leaves(one)]
        fresh = [leaf for leaf, _ in given if self.known(leaf) is None]
        optimizers = [leaf for leaf in fresh if isinstance(leaf, torch.optim.Optimizer)]
        self._consider(fresh, optimizers)
        for leaf, place in given:
            if isinstance(leaf, nn.Module):
                self.model(leaf, place, optimizers=optimizers)

    def _consider(self, fresh: Sequence[Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Lets the chooser see everything that came together, before any of it is wrapped."""
        if self._chooser is not None:
            self._chooser.consider(
                [one for one in fresh if isinstance(one, nn.Module)],
                [_bare(one) for one in optimizers],
                [_read(one) for one in fresh if isinstance(one, (DataLoader, ShardedLoader))],
            )

    def _one(self, value: Any, *, place: bool | None) -> Any:
        if isinstance(value, nn.Module):
            return self.model(value, place)
        if isinstance(value, torch.optim.Optimizer):
            return self.optimizer(value)
        if isinstance(value, (DataLoader, ShardedLoader)):
            return self.loader(value, place)
        if isinstance(value, PreparedScheduler) or is_scheduler(value):
            return self.scheduler(value)
        raise ConfigError(
            f"prepare cannot do anything with a {type(value).__name__}; give models (nn.Module), optimizers, "
            "DataLoaders or learning-rate schedulers"
        )

    def known(self, value: Any) -> Any:
        """What `value` was prepared as; None if it was not."""
        found = self._prepared.get(id(value))
        return None if found is None else found[1]

    def prepared_or_same(self, model: nn.Module) -> nn.Module:
        """The prepared model of one of the user's; any other as it is."""
        known: nn.Module | None = self.known(model)
        return model if known is None else known  # an empty container is false, and has been prepared

    def _keep(self, original: Any, prepared: Any) -> Any:
        # The original is kept too, so that its id cannot be given to another object.
        self._prepared[id(original)] = self._prepared[id(prepared)] = (original, prepared)
        return prepared

    def model(
        self,
        model: nn.Module,
        place: bool | None,
        evaluation_mode: bool = False,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> nn.Module:
        """The model on its device, in its precision, spread over the ranks unless `evaluation_mode`.

        `optimizers`: those that may hold its parameters.
        """
        known: nn.Module | None = self.known(model)
        if known is not None:
            return known
        loop = self._loop
        if not evaluation_mode:
            self._consider([model], optimizers)
        inner = loop.strategy.unwrap(model)
        restore_forward(inner)
        place = self._place if place is None else place
        if self._compile:
            compiling.compile_module(inner, self._compile)
        if evaluation_mode:
            wrapped = inner.to(self._device) if place else inner
        else:
            if loop.strategy.alike and loop.world.size > 1:
                _check_equal(inner, loop.world)
            wrapped = self._spread(model, optimizers, place)
            loop.learning.spread(wrapped)
        plain = loop.strategy.handles_precision and not evaluation_mode
        precision = self._plain if plain else self._precision
        if wrapped is inner:
            patch_forward(inner, precision, loop.stopwatch)
        else:
            patch_forward(inner, precision, None)
            patch_forward(wrapped, self._plain, loop.stopwatch)
        loop.models.append(wrapped)
        loop.windows = {(): loop.windows[()]}  # which models are "all" has changed
        if self._trust is not None and not evaluation_mode:
            self._trust.prepared_model(wrapped)
        return self._keep(model, wrapped)  # type: ignore[no-any-return]

    def _spread(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], place: bool
    ) -> nn.Module:
        held = {id(parameter) for parameter in model.parameters()}
        own = [o for o in map(_bare, optimizers) if any(id(p) in held for p in _parameters(o))]
        present = [self._stepped.get(id(one), one) for one in own]
        wrapped, stepped = self._loop.strategy.wrap(model, present, place=place)
        self._stepped.update(zip(map(id, own), stepped, strict=True))
        return wrapped

    def optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """The optimizer, stepping only where gradients are synchronised."""
        known: PreparedOptimizer | None = self.known(optimizer)
        if known is not None:
            return known
        bare = _bare(optimizer)
        stepped = self._stepped.pop(id(bare), None)
        inner = self._loop.strategy.adopt(bare) if stepped is None else stepped
        prepared = PreparedOptimizer(inner, self._loop, leads=not self._saving.optimizers)
        self._saving.optimizers.append(inner)
        self._saving.expect_resume(inner)
        self._loop.lead(True)
        if self._trust is not None:
            self._trust.prepared_optimizer(inner)
        self._keep(inner, prepared)
        self._keep(bare, prepared)
        return self._keep(optimizer, prepared)  # type: ignore[no-any-return]

    def loader(
        self, loader: DataLoader[Any] | ShardedLoader, place: bool | None, **options: Any
    ) -> ShardedLoader:
        """The loader divided over the ranks; `options` are those of `ShardedLoader`."""
        known: ShardedLoader | None = self.known(loader)
        if known is not None:
            return known
        inner = _read(loader)
        number = len(self._saving.loaders)
        name = "train" if number == 0 else f"loader {number}"
        prepared = ShardedLoader(
            inner,
            world=self._loop.world,
            axis=self._axis(),
            device=self._device if (self._place if place is None else place) else "cpu",
            loop=self._loop,
            upload=self._loop.strategy.upload,
            **{"name": name, **self._loader_options, **options},
        )
        self._saving.loaders.append(prepared)
        if self._loop.stopwatch is not None:
            self._loop.stopwatch.watch(prepared)
        self._keep(inner, prepared)
        return self._keep(loader, prepared)  # type: ignore[no-any-return]

    def _axis(self) -> World:
        """The world as the data sees it: ranks that share one copy of the model are one."""
        world, axis = self._loop.world, self._loop.strategy.data_axis
        share = world.size // axis.size
        return replace(world, rank=axis.rank, size=axis.size, local_size=max(1, world.local_size // share))

    def scheduler(self, scheduler: Any) -> PreparedScheduler:
        """The scheduler, stepping once per optimizer step."""
        known: PreparedScheduler | None = self.known(scheduler)
        if known is not None:
            return known
        inner = scheduler.scheduler if isinstance(scheduler, PreparedScheduler) else scheduler
        prepared = PreparedScheduler(
            inner, self._loop, follows=self._scheduler_follows, repeat=self._scheduler_repeat
        )
        self._saving.schedulers.append(prepared)
        self._keep(inner, prepared)
        return self._keep(scheduler, prepared)  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Forgets everything; models get their own forward back."""
        for original, prepared in self._prepared.values():
            for one in (original, prepared):
                if isinstance(one, nn.Module):
                    restore_forward(one)
        self._prepared.clear()
        self._stepped.clear()
        self._loop.strategy.forget()
        self._loop.forget()
        if self._trust is not None:
            self._trust.forget()
        for listed in (self._saving.optimizers, self._saving.schedulers, self._saving.loaders):
            listed.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _check_equal(model: nn.Module, world: World) -> None:
    """Compares the ranks' parameters and buffers by name, shape and type, since whatever copies, averages or divides
    them would wait or mix them up.

    Raises:
        TrustError: they differ; the first that does is named.
    """
    mine = [_described(name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]]
    if len(set(gather_object(digest("\n".join(mine)), world=world))) == 1:
        return
    told = gather_object(mine, world=world)
    other = next(rank for rank, theirs in enumerate(told) if theirs != told[0])
    pairs = itertools.zip_longest(told[0], told[other], fillvalue="nothing more")
    first, second = next((one, another) for one, another in pairs if one != another)
    raise TrustError(
        f"the ranks prepared different models: rank 0 has {first} and rank {other} {second} in a "
        f"{type(model).__name__}. Every rank must make the same model; look for a branch on the rank, or for a size "
        "that is read from a rank's part of the data."
    )


def _described(name: str, tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return f"{name!r} (lazy)"
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{name!r} {list(tensor.shape)} of {kind}{' (frozen)' if frozen else ''}"


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, PreparedOptimizer) else optimizer


def _read(loader: DataLoader[Any] | ShardedLoader) -> DataLoader[Any]:
    return loader.dataloader if isinstance(loader, ShardedLoader) else loader


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
