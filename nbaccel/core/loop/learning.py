"""Which parameters want gradients: looked at because strategies are set up for those that did.

A model whose layers are unfrozen one after another is the usual case. DDP averages the gradients of the parameters
that it found when it was made, and no others; ZeRO steps those alone. Before each pass all are looked at; within one,
before each forward, those that were frozen: a run over a stream has one pass only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.model.hooks import Hook
from nbaccel.core.strategies.base import Strategy

__all__ = ["Learning"]


@final
class Learning:
    """The models that a strategy has spread, and what learned in each when it last heard of it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._known: dict[nn.Module, dict[str, bool]] = {}
        self._frozen: dict[nn.Module, list[nn.Parameter]] = {}
        self._hooks: list[RemovableHandle] = []

    def spread(self, model: nn.Module) -> None:
        """A model was just spread over the ranks."""
        self._note(model, self._flags(model))

    def look(self) -> None:
        """Tells the strategy of models in which other parameters learn than before.

        One of which nothing learns, as a discriminator while the generator is trained, is left as it was.

        Raises:
            ConfigError: it cannot follow.
        """
        for model, known in self._known.items():
            now = self._flags(model)
            if now != known and any(now.values()):
                # an adapter's parameters may be new, and those it stands for gone
                changed = [name for name in {**known, **now} if known.get(name) != now.get(name)]
                self._strategy.learns_otherwise(model, changed)
                self._note(model, now)

    def forget(self) -> None:
        """No model is spread any more."""
        self._known.clear()
        self._frozen.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, model: nn.Module, flags: dict[str, bool]) -> None:
        self._known[model] = flags
        frozen = [p for p in self._strategy.unwrap(model).parameters() if not p.requires_grad]
        if model in self._frozen:
            self._frozen[model][:] = frozen
        elif frozen and not self._strategy.plain and model._compiled_call_impl is None:
            # A compiled call would have to be compiled again when a layer learns, with the hook in it.
            self._frozen[model] = frozen
            self._hooks.append(model.register_forward_pre_hook(Hook(partial(self._before_forward, frozen))))

    def _before_forward(self, frozen: Sequence[nn.Parameter], *_: Any) -> None:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in frozen):
            self.look()

    def _flags(self, model: nn.Module) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self._strategy.unwrap(model).named_parameters()}
