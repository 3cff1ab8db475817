"""Accumulation windows: which micro-step synchronises, and what each contributes to the gradient.

A window is the micro-steps of one optimizer step. Its gradient is to be that of the mean over all its
samples, on all ranks together: micro-step k of rank r, whose loss is a mean over n[r, k] samples, counts
n[r, k] * R / N, where N is the window's sum of samples and R the number of ranks, by which DDP divides.
Away from the tail this is 1 / (micro-steps per window).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, final

import torch
from torch import nn

from nbaccel.errors import ConfigError

__all__ = ["BatchInfo", "LossWeighting", "Window"]

LossWeighting = Literal["samples", "equal"]


class BatchInfo(Protocol):
    """What a window asks of the loader whose batch is in hand."""

    @property
    def at_end(self) -> bool: ...
    @property
    def batch_samples(self) -> int: ...
    @property
    def batch_repeated(self) -> int: ...
    @property
    def even_batches(self) -> bool: ...
    @property
    def global_batch_samples(self) -> int | None: ...
    @property
    def total_samples(self) -> int | None: ...
    @property
    def total_batch_size(self) -> int | None: ...
    @property
    def position(self) -> int: ...


@final
class Window:
    """The window in progress of one set of models.

    Args:
        length: micro-steps in a full window.
        num_ranks: by how many ranks' gradients are averaged.
    """

    __slots__ = (
        "_equal",
        "_planned",
        "_seen",
        "begun",
        "dirty",
        "factor",
        "length",
        "micro",
        "models",
        "num_ranks",
        "open",
        "owed",
        "sync",
        "weighed_at",
        "weights",
    )

    def __init__(
        self, models: Sequence[nn.Module], *, length: int, num_ranks: int, weighting: LossWeighting
    ) -> None:
        self.models = models
        self.length = length
        self.num_ranks = num_ranks
        self.micro = 0
        """Index of the micro-step within the window."""
        self.sync = True
        """Whether the micro-step in progress (or the last one) ends the window."""
        self.factor = 1.0
        """What the loss of this micro-step is multiplied with."""
        self.begun = False
        """Whether any micro-step has begun: told apart from a loop that never accumulates."""
        self.open = False
        """Whether a micro-step is in progress, which `factor` then is that of."""
        self.dirty = False
        """Whether this window has gradients already."""
        self.owed = 1.0
        """What the gradients must still be multiplied with, once the window's last backward is done."""
        self.weights: float | torch.Tensor | None = None
        """Sum of the explicit weights of this window's losses on this rank."""
        self.weighed_at = 0
        """The micro-step that the last of them was given in."""
        self._planned = self._seen = 0.0
        self._equal = weighting == "equal"

    def begin(self, loader: BatchInfo | None) -> None:
        """A micro-step begins with the loader's batch in hand."""
        self.begun = self.open = True
        length = self.length
        last = self.micro + 1 >= length or (loader is not None and loader.at_end)
        self.sync = last
        if length == 1:
            self.factor = 1.0 if self.num_ranks == 1 else self.tail_factor(loader)
            return
        if loader is None or self._equal:
            self.factor = 1.0 / length
            if last and self.micro + 1 < length:
                self._correct(length / (self.micro + 1))
            return
        mine, everyone, planned = self._samples(loader)
        if self.micro == 0:
            self._planned, self._seen = planned, 0.0
        self._seen += everyone
        self.factor = mine / self._planned
        if last and self._seen != self._planned:
            self._correct(self._planned / self._seen)

    def end(self) -> None:
        """The micro-step is over."""
        if self.sync:
            self.drop()
        else:
            self.micro, self.open = self.micro + 1, False

    def drop(self) -> None:
        """The next micro-step is the first of another window."""
        self.micro, self.sync, self.dirty, self.weights, self.owed = 0, True, False, None, 1.0
        self.open = False

    def check_alone(self, windows: Iterable[Window], rank: int) -> None:
        """Refuses to multiply the gradients of this window's models where another one has some among them.

        Raises:
            ConfigError: it has, and is not finished.
        """
        for other in windows:
            if other is not self and other.dirty and not set(self.models).isdisjoint(other.models):
                raise ConfigError(
                    f"backward on rank {rank}: the gradients of a window over {len(self.models)} model(s) are to be "
                    "weighed, and among them are some of another window that is not finished. Name the models of each "
                    "micro-step, `with accelerator.accumulate(model):`, so that no model is in two windows at once"
                )

    def tail_factor(self, loader: BatchInfo | None) -> float:
        """The factor of a window of one micro-step: 1 unless the ranks' batches are unequal."""
        if loader is None or self._equal:
            return 1.0
        everyone = loader.global_batch_samples
        if not everyone or (loader.even_batches and loader.at_end):
            return 1.0
        return loader.batch_samples * self.num_ranks / everyone

    def _samples(self, loader: BatchInfo) -> tuple[float, float, float]:
        """This micro-step's samples here times R and on all ranks, and the window's as planned at its first.

        In micro-steps instead of samples where samples are not known. A batch that was filled with repeated
        samples counts as the full one it was asked to be. Where batches have no size (a batch sampler gives them),
        the rest of the window is planned to be like its first.
        """
        everyone, full = loader.global_batch_samples, loader.total_batch_size
        if not everyone:
            return 1.0, 1.0, float(self.length)
        if loader.even_batches and loader.at_end:
            filled = float(full or (loader.batch_samples + loader.batch_repeated) * self.num_ranks)
            return filled, filled, filled
        planned = float(self.length * (full or everyone))
        total = loader.total_samples
        if total is not None:
            # `position` counts the batch in hand as consumed.
            planned = min(planned, float(total - loader.position + everyone))
        return float(loader.batch_samples * self.num_ranks), float(everyone), planned

    def _correct(self, ratio: float) -> None:
        """The window turned out shorter than planned. What it has accumulated may be out of reach (sharded
        strategies keep it aside until the ranks exchange it), so everything is rescaled afterwards."""
        self.owed = ratio

    def settle(self) -> float:
        """What the gradients are to be multiplied with now; a further backward of the same micro-step is
        given it beforehand."""
        owed, self.owed = self.owed, 1.0
        self.factor *= owed
        return owed
