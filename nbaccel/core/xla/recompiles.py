"""Says so when XLA compiles a loop's step again and again, and for which shapes.

XLA compiles a graph for the shapes it has: each new shape of a batch costs seconds, on a TPU often minutes. The
first two optimizer steps are compiled in any case: the second finds the optimizer's state there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nbaccel.core.model.hooks import Hook
from nbaccel.core.nested import leaves
from nbaccel.ownership import is_users

__all__ = ["Recompiles"]

_EXPECTED = 2
_WORTH_A_WORD = 3
"""Shapes of a step's inputs: the second is the last batch of an epoch."""
_MOST = 64  # different shapes that are remembered: whoever has more has been told
_UNEXPLAINED = 3  # compilations without a new shape that are worth a word

Shapes = tuple[str, ...]


@final
class Recompiles:
    """Watches the steps of one loop, and those of its evaluations; at most one warning of each kind.

    Args:
        compiled: how many graphs were compiled so far.
    """

    def __init__(self, compiled: Callable[[], int]) -> None:
        self._compiled, self._before = compiled, compiled()
        self._inputs: list[str] = []
        self._evaluated: list[str] = []
        """Those of calls without gradients."""
        self._training, self._evaluation = _Seen("training"), _Seen("evaluation")
        self._unexplained: list[int] = []
        self._brought: Any = WeakIdKeyDictionary()
        """By a batch's tensor: the shapes of the whole batch, and which of them is its own."""

    def brought(self, batch: Sequence[Tensor]) -> None:
        """A loader has brought these together; any thread may say so."""
        shapes = tuple(map(_shape, batch))
        for index, tensor in enumerate(batch):
            self._brought[tensor] = shapes, index

    def watch(self, module: nn.Module) -> None:
        """Note what `module` is called with."""
        module.register_forward_pre_hook(Hook(self._note), with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not module.training:
            return
        inputs = self._inputs if torch.is_grad_enabled() else self._evaluated
        tensors = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs += map(_shape, tensors)
        inputs += self._beside(tensors)

    def _beside(self, inputs: list[Tensor]) -> list[str]:
        """The shapes of what came in one batch with these and is none of them, as targets."""
        found: dict[Shapes, set[int]] = {}
        for tensor in inputs:
            if (known := self._brought.get(tensor)) is not None:
                found.setdefault(known[0], set()).add(known[1])
        return [shape for shapes, used in found.items() for at, shape in enumerate(shapes) if at not in used]

    def stepped(self) -> None:
        """The graph of an optimizer step was cut."""
        shapes, self._inputs, self._evaluated = tuple(self._inputs), [], []
        steps = self._training
        known = steps.add(shapes)
        if not self._have_compiled() or steps.number <= _EXPECTED:
            return
        if not known:
            steps.tell()
        else:
            self._unexplained.append(steps.number)
            if len(self._unexplained) == _UNEXPLAINED:
                self._tell_unexplained()

    def evaluated(self) -> None:
        """The graph of an evaluation's step was cut."""
        shapes, self._evaluated = tuple(self._evaluated), []
        known = self._evaluation.add(shapes)
        if self._have_compiled() and not known:
            self._evaluation.tell()

    def within_training(self) -> None:
        """What was called without gradients belongs to a step of training, as a teacher's outputs do."""
        self._evaluated = []

    def _have_compiled(self) -> bool:
        """Since this was asked last."""
        before, self._before = self._before, self._compiled()
        return self._before > before

    def _tell_unexplained(self) -> None:
        steps = ", ".join(map(str, self._unexplained))
        _warn(
            f"XLA compiled the training step again at steps {steps}, although the model's inputs had shapes it had "
            "seen before. Likely cause: a branch or a shape that depends on values (also of what is no input of the "
            "model, as targets that no prepared loader has brought), a Python number that changes and becomes part of "
            "the graph, or a value read (loss.item()) in some steps only."
        )


@final
class _Seen:
    """The shapes that the inputs of one kind of step have had."""

    def __init__(self, kind: str) -> None:
        self.number = 0
        """Steps so far."""
        self._kind, self._told = kind, False
        self._first: dict[Shapes, int] = {}
        """The step that had them first."""

    def add(self, shapes: Shapes) -> bool:
        """Another step; whether there was one of these shapes before."""
        self.number += 1
        known = shapes in self._first
        if not known and len(self._first) < _MOST:
            self._first[shapes] = self.number
        return known

    def tell(self) -> None:
        """A new one was compiled."""
        if self._told or len(self._first) < _WORTH_A_WORD:
            return
        self._told = True
        listed = "; ".join(f"step {step}: {_text(shapes)}" for shapes, step in list(self._first.items())[-4:])
        _warn(
            f"XLA compiles the {self._kind} step again for each new shape of the model's inputs, or of what came with "
            f"them in a batch, {len(self._first)} so far ({listed}), and each compilation takes long. Pad the batches "
            "to one shape, or to a few; drop_last=True leaves a smaller last one out. This is said once."
        )


def _warn(text: str) -> None:
    """At the person's own line."""
    level, frame = 1, sys._getframe()
    while not is_users(frame.f_code.co_filename) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _text(shapes: Shapes) -> str:
    text = ", ".join(shapes[:4]) or "no tensor"
    return f"{text} and {len(shapes) - 4} more" if len(shapes) > 4 else text
