"""Which parameters want gradients: looked at before each pass, because strategies are set up for those that did.

A model whose layers are unfrozen one after another is the usual case. DDP averages the gradients of the parameters
that it found when it was made, and no others; ZeRO steps those alone.
"""

from __future__ import annotations

from typing import final

from torch import nn

from nbaccel.core.strategies.base import Strategy

__all__ = ["Learning"]


@final
class Learning:
    """The models that a strategy has spread, and what learned in each when it last heard of it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._known: dict[nn.Module, dict[str, bool]] = {}

    def spread(self, model: nn.Module) -> None:
        """A model was just spread over the ranks."""
        self._known[model] = self._flags(model)

    def look(self) -> None:
        """Tells the strategy of models in which other parameters learn than before.

        Raises:
            ConfigError: it cannot follow.
        """
        for model, known in self._known.items():
            now = self._flags(model)
            if now != known:
                # an adapter's parameters may be new, and those it stands for gone
                changed = [name for name in {**known, **now} if known.get(name) != now.get(name)]
                self._strategy.learns_otherwise(model, changed)
                self._known[model] = now

    def forget(self) -> None:
        """No model is spread any more."""
        self._known.clear()

    def _flags(self, model: nn.Module) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self._strategy.unwrap(model).named_parameters()}
