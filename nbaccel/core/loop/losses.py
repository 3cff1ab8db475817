"""What `backward` is given: one number, perhaps a sum over so many units whose mean over all ranks is meant.

Where a backward is a window by itself, its loss is divided by the sum of all ranks' weights beforehand. In a longer
window that sum is known in the last micro-step only: the gradients are divided when its backward is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from nbaccel.core.loop.accumulate import Window
from nbaccel.core.loop.step_times import Stopwatch
from nbaccel.core.strategies.base import Strategy
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["EVERY_OR_NONE", "UNEVEN", "GivenWeights", "check_one_number"]

EVERY_OR_NONE = "backward(weight=...) on rank {rank} must be given for every loss of a window, or for none"
UNEVEN = (
    "backward(weight=...) on rank {rank} adds up the weights of all ranks, of which some may have no batches left in "
    "join_uneven_inputs. Prepared loaders give every rank equally many: leave join_uneven_inputs out"
)

_LACK_DOUBLES = ("mps", "xla")  # devices without float64, or that emulate it (XLA on TPUs)


@final
class GivenWeights:
    """Divides by the weights given to `backward`."""

    def __init__(self, world: World, strategy: Strategy, stopwatch: Stopwatch | None) -> None:
        self._world, self._strategy, self._stopwatch = world, strategy, stopwatch
        self._sum: tuple[Tensor, dist.Work | None] | None = None
        """Of the weights of a window whose gradients are divided after this backward, under way over the ranks."""

    def weigh(
        self,
        loss: Tensor,
        weight: float | Tensor,
        window: Window,
        windows: Iterable[Window],
        *,
        filler: bool,
    ) -> Tensor:
        """What to go backward from.

        Args:
            windows: all there are.
            filler: whether the batch is there only so that this rank has as many as the others.

        Raises:
            ConfigError: the weight is none, or what the window has already, or another one has of its models, would
                be divided wrongly.
        """
        if not isinstance(weight, (int, float)) and not (isinstance(weight, Tensor) and weight.numel() == 1):
            raise ConfigError(
                f"backward(weight=...) on rank {self._world.rank} takes one number, of the units that its loss is "
                f"a sum over, not {weight!r}"
            )
        if filler:
            loss, weight = loss * 0.0, weight * 0.0
        if window.length == 1 or not window.open:
            return loss * self._ratio(self._add_up(weight))
        self._check(window, windows)
        if isinstance(weight, Tensor):
            weight = weight.detach()
        window.dirty, window.weighed_at = True, window.micro
        window.weights = weight if window.weights is None else window.weights + weight
        if window.sync:
            self._sum = self._add_up(window.weights)  # runs while backward computes
        return loss

    def divide(self, window: Window) -> None:
        """After the backward: divides the window's gradients, if it was the last and nothing was divided beforehand."""
        if self._sum is not None:
            under_way, self._sum = self._sum, None
            self._strategy.scale_gradients(window.models, self._ratio(under_way))

    def _check(self, window: Window, windows: Iterable[Window]) -> None:
        if window.weights is None and window.dirty:
            raise ConfigError(EVERY_OR_NONE.format(rank=self._world.rank))
        if window.weights is not None and window.weighed_at == window.micro:
            raise ConfigError(
                f"backward(weight=...) was called twice on rank {self._world.rank} in micro-step {window.micro + 1} of "
                f"{window.length}: whether these are two losses, or two parts of one, is not known. Make each part a "
                "micro-step; add two losses up beforehand; give each of two models a micro-step of its own, "
                "`with accelerator.accumulate(model):`"
            )
        window.check_alone(windows, self._world.rank)

    def _add_up(self, weight: float | Tensor) -> tuple[Tensor, dist.Work | None]:
        """The sum over all ranks, and what to wait for."""
        coarse = isinstance(weight, Tensor) and weight.device.type in _LACK_DOUBLES
        total = torch.as_tensor(weight, dtype=torch.float32 if coarse else torch.float64)
        total = total.detach().reshape(1).clone()
        if total.device.type == "cpu":
            total = total.to(self._world.control_device)
        return total, self._strategy.add_over_ranks(total) if self._world.size > 1 else None

    def _ratio(self, under_way: tuple[Tensor, dist.Work | None]) -> float | Tensor:
        """What a sum over this rank's units is multiplied with: gradients are averaged over the ranks."""
        total, work = under_way
        if work is not None:
            if self._stopwatch is None:
                work.wait()
            else:
                with self._stopwatch.measure("communication"):
                    work.wait()
        if total.device.type != "cpu":
            return (self._world.size / total).to(torch.float32).squeeze(0)
        weight = total.item()
        if not weight > 0:
            raise ConfigError(
                f"the weights of all ranks, given to backward on rank {self._world.rank}, add up to {weight}; they "
                "must be above 0"
            )
        return self._world.size / weight


def check_one_number(loss: object, kwargs: Mapping[str, Any]) -> None:
    """Refuses a loss that is not one number, unless its gradient is given.

    Raises:
        ConfigError: what it is, and what to give.
    """
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(
            f"backward needs a loss: a tensor of one number. It was given a {type(loss).__name__}; of a model's output "
            "give the loss in it, and no .item()"
        )
    if loss.ndim and loss.numel() != 1 and "gradient" not in kwargs:
        raise ConfigError(
            f"backward needs a loss of one number; this one has shape {list(loss.shape)}. Take its mean."
        )
