"""What stands for an optimizer in the loop."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["InnerOptimizer"]


class InnerOptimizer(Optimizer):
    """An optimizer whose groups and state are those of the one it stands for.

    Subclasses set `optimizer`, and leave out `Optimizer.__init__`, which would make groups and state of its own.
    """

    optimizer: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults
