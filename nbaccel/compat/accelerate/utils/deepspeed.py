"""What scripts import for the optimizers of DeepSpeed's configuration files, which do not exist here."""

from __future__ import annotations

from typing import Any, final

from nbaccel.compat.accelerate.names import look_up
from nbaccel.errors import ConfigError

__all__ = ["DummyOptim", "DummyScheduler", "get_active_deepspeed_plugin"]


@final
class DummyOptim:
    """Refused: it stands for an optimizer that only a DeepSpeed configuration names.

    Raises:
        ConfigError: always.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            "DummyOptim does not exist here: make the optimizer in the script, as for any other strategy, and leave "
            "'optimizer' out of DeepSpeed's configuration"
        )


@final
class DummyScheduler:
    """Refused, in the same way.

    Raises:
        ConfigError: always.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            "DummyScheduler does not exist here: make the scheduler in the script, and leave 'scheduler' out of "
            "DeepSpeed's configuration"
        )


def get_active_deepspeed_plugin(state: Any) -> None:
    """None: an Accelerator has one strategy; what DeepSpeed was asked is `Accelerator().config.deepspeed`."""


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
