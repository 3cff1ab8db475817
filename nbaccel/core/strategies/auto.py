"""Whichever strategy the planner chooses, once it is seen what is to be trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from nbaccel.core.checkpoint import Sharded
from nbaccel.core.plan import Plan, Spread
from nbaccel.core.planning import Given, plan_for
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.base import DataAxis, Strategy, trainable
from nbaccel.core.world import World
from nbaccel.wire import events

__all__ = ["Auto"]


@final
class Auto(Strategy):
    """Passes everything on: to `whole` until there is something to train, then to what the planner chose.

    Args:
        name: what was asked: "auto", or a strategy of which the planner is to choose the kind.
        whole: the strategy of whole copies.
        build: the strategy that spreads a model so.
        refuse: why a way is out of the question for what is given; empty if it is not.
    """

    def __init__(
        self,
        name: str,
        world: World,
        precision: Precision,
        *,
        whole: Strategy,
        build: Callable[[Spread], Strategy],
        refuse: Callable[[Spread, Given], str],
        handles_precision: bool,
    ) -> None:
        self._asked, self._world, self._precision = name, world, precision
        self._build, self._refuse = build, refuse
        self._adopted = False
        """Whether an optimizer came before any model."""
        self.plan: Plan | None = None
        """What was chosen and why; None until there is something to train."""
        self._pass_to(whole)
        self.name, self.handles_precision = name, handles_precision

    def _pass_to(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.name, self.plain, self.handles_precision = (
            strategy.name,
            strategy.plain,
            strategy.handles_precision,
        )
        self.replicates, self.apart = strategy.replicates, strategy.apart

    def consider(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], loaders: Sequence[DataLoader[Any]]
    ) -> None:
        """Chooses, the first time that there is a model to train among what is about to be prepared.

        Called by all ranks together.

        Raises:
            ConfigError: there is no way to train it; the same on every rank.
        """
        trained = [model for model in models if trainable(model)]
        if self.plan is not None or not trained:
            return
        given = Given(models=trained, optimizers=optimizers, loaders=loaders)
        plan = plan_for(given, self._world, self._precision, lambda spread: self._why_not(spread, given))
        assert plan.chosen is not None
        self._pass_to(self._build(plan.chosen.spread))
        self.plan = plan
        events.emit(events.Applied(option="strategy", value=self.name))
        if self._world.is_main:
            if plan.chosen.why_not:
                warnings.warn(f"strategy {self._asked!r}: {plan.why()}", stacklevel=5)
            else:
                print(f"strategy {self._asked!r}: {plan.why()}", flush=True)

    def _why_not(self, spread: Spread, given: Given) -> str:
        copies = spread.family in ("single", "ddp")
        if copies and any(p.is_meta for model in given.models for p in model.parameters()):
            return "the model is on the meta device, from which shards are filled and copies are not"
        if self._adopted and not copies:
            return "an optimizer was prepared before its model: prepare(model, optimizer)"
        return self._refuse(spread, given)

    # What is passed on -------------------------------------------------------------------------------

    @property
    def data_axis(self) -> DataAxis:
        return self._strategy.data_axis

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        return self._strategy.wrap(module, optimizers, place=place)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        self._adopted = self._adopted or self.plan is None
        return self._strategy.adopt(optimizer)

    def forget(self) -> None:
        self._strategy.forget()

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:
        self._strategy.learns_otherwise(module, changed)

    def unwrap(self, module: nn.Module) -> nn.Module:
        return self._strategy.unwrap(module)

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        self._strategy.set_sync(module, synchronize)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return self._strategy.no_sync(module)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        self._strategy.sync_in_backward(module, outputs)

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        self._strategy.backward(loss, modules, options)

    def scale_gradients(self, modules: Sequence[nn.Module], ratio: float | Tensor) -> None:
        self._strategy.scale_gradients(modules, ratio)

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        return self._strategy.join(modules)

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return self._strategy.clip_grad_norm(parameters, max_norm, norm_type)

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        self._strategy.clip_grad_value(parameters, clip_value)

    def left_step_out(self, optimizer: Optimizer) -> bool:
        return self._strategy.left_step_out(optimizer)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return self._strategy.full_state_dict(module, rank_zero_only=rank_zero_only)

    def load_weights(self, module: nn.Module, folder: str | Path, *, strict: bool) -> str:
        return self._strategy.load_weights(module, folder, strict=strict)

    def model_state(self, module: nn.Module) -> Sharded:
        return self._strategy.model_state(module)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        return self._strategy.optimizer_state(optimizer, modules)
