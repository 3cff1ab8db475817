"""Says so when XLA compiles a loop's step again and again, and for which shapes.

XLA compiles a graph for the shapes it has: each new shape of a batch costs seconds, on a TPU often minutes. The
first two optimizer steps are compiled in any case: the second finds the optimizer's state there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.model.hooks import Hook
from nbaccel.core.nested import leaves

__all__ = ["Recompiles"]

_EXPECTED = 2
_MOST = 64  # different shapes that are remembered: whoever has more has been told
_UNEXPLAINED = 3  # compilations without a new shape that are worth a word

Shapes = tuple[str, ...]


@final
class Recompiles:
    """Watches the steps of one loop; at most a few warnings.

    Args:
        compiled: how many graphs were compiled so far.
    """

    def __init__(self, compiled: Callable[[], int]) -> None:
        self._compiled, self._before = compiled, compiled()
        self._inputs: list[str] = []
        self._steps = 0
        self._seen: dict[Shapes, int] = {}
        """Shapes of the inputs by step, and the step that had them first."""
        self._unexplained: list[int] = []
        self._worth_a_word = 3
        """So many shapes, the next time: the second is the last batch of an epoch."""

    def watch(self, module: nn.Module) -> None:
        """Note what `module` is called with while it trains."""
        module.register_forward_pre_hook(Hook(self._note), with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._inputs += [_shape(leaf) for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def stepped(self) -> None:
        """The graph of an optimizer step was cut."""
        self._steps += 1
        shapes, self._inputs = tuple(self._inputs), []
        known = shapes in self._seen
        if not known and len(self._seen) < _MOST:
            self._seen[shapes] = self._steps
        before, self._before = self._before, self._compiled()
        if self._before == before or self._steps <= _EXPECTED:
            return
        if not known:
            self._tell_shapes()
        else:
            self._unexplained.append(self._steps)
            if len(self._unexplained) == _UNEXPLAINED:
                self._tell_unexplained()

    def _tell_shapes(self) -> None:
        number = len(self._seen)
        if number < self._worth_a_word:
            return
        self._worth_a_word *= 2
        listed = "; ".join(f"step {step}: {_text(shapes)}" for shapes, step in list(self._seen.items())[-4:])
        warnings.warn(
            f"XLA has compiled the training step for {number} different shapes of the model's inputs ({listed}), and "
            "each compilation takes long. Pad the batches to one shape, or to a few; drop_last=True leaves a "
            "smaller last one out.",
            stacklevel=2,
        )

    def _tell_unexplained(self) -> None:
        steps = ", ".join(map(str, self._unexplained))
        warnings.warn(
            f"XLA compiled the training step again at steps {steps}, although the model's inputs had shapes it had "
            "seen before. Likely cause: a branch or a shape that depends on values, a Python number that changes and "
            "becomes part of the graph, or a value read (loss.item()) in some steps only.",
            stacklevel=2,
        )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _text(shapes: Shapes) -> str:
    text = ", ".join(shapes[:4]) or "no tensor"
    return f"{text} and {len(shapes) - 4} more" if len(shapes) > 4 else text
