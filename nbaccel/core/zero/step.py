"""The optimizer of the loop where ZeRO steps: the user's own by its groups, the engine behind `step`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, final

from torch.optim import Optimizer

from nbaccel.core.inner_optimizer import InnerOptimizer
from nbaccel.core.zero import gradients
from nbaccel.core.zero.changes import Changes
from nbaccel.errors import ConfigError

__all__ = ["ZeroStep"]


@final
class ZeroStep(InnerOptimizer):
    """The user's optimizer, stepped by the engine."""

    def __init__(self, optimizer: Optimizer, engine: Any, changes: Changes) -> None:
        self.optimizer, self._engine, self._changes = optimizer, engine, changes
        # Its own: stage 3 steps the user's optimizer once for each sub-group.
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the engine, which clears the gradients too."""
        if closure is not None:
            raise ConfigError("an optimizer's closure cannot go with strategy 'deepspeed'")
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (), {})
        self._changes.take_over()
        self._engine.step()
        self._changes.stepped()
        self._engine.optimizer.clip_grad = 0.0
        gradients.forget_norm(self._engine.optimizer)
        gradients.clear(self._engine.optimizer)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (), {})

    @property
    def step_was_skipped(self) -> bool:
        """Whether some gradient was not finite, by fp16's overflow or else, and DeepSpeed left the step out."""
        return not self._engine.was_step_applied()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of batches that are left out; after a step the engine has done it."""
        gradients.drop(self._engine.optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ConfigError(
            "add_param_group cannot go with ZeRO, which has laid out what it steps: make the optimizer with all its "
            "groups before prepare; or save_state, and load_state after preparing model and optimizer afresh"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ConfigError("under ZeRO an optimizer's state is loaded by acc.load_state(folder)")

    def __repr__(self) -> str:
        return f"ZeRO({self.optimizer!r})"
