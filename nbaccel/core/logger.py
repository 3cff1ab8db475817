"""Logging from several ranks on the standard library's `logging`: from one of them, from all, or in order."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import MutableMapping
from typing import Any, final

import torch.distributed as dist

from nbaccel.core.comm.collectives import barrier
from nbaccel.core.world import join, read_environment
from nbaccel.wire import events

__all__ = ["RankLogger", "get_logger"]

_warned: set[tuple[Any, ...]] = set()
_lock = threading.Lock()


def get_logger(name: str, log_level: str | int | None = None) -> RankLogger:
    """A logger that speaks on the main process only, unless a call asks otherwise.

    ```python
    logger = get_logger(__name__)
    logger.info("once")
    logger.info("from each rank", main_process_only=False)
    logger.info("from each rank, rank 0 first", in_order=True)  # called on all ranks
    logger.warning_once("said at its first call only")
    ```

    Args:
        name: as for `logging.getLogger`.
        log_level: "DEBUG", "INFO", …, for this logger and the root's; None is what ACCELERATE_LOG_LEVEL says (the
            variable that scripts of Hugging Face Accelerate set), else the levels they have.
    """
    logger = logging.getLogger(name)
    level = log_level or os.environ.get("ACCELERATE_LOG_LEVEL")
    if level is not None:
        logger.setLevel(level.upper() if isinstance(level, str) else level)
        logger.root.setLevel(level.upper() if isinstance(level, str) else level)
    return RankLogger(logger, {})


@final
class RankLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """What `get_logger` gives: a standard adapter whose calls take `main_process_only` and `in_order` too.

    With several ranks each message names its own, unless the launch labels what its ranks print; `%(rank)s` of a
    format is the rank everywhere.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        rank, size = _place()
        kwargs["extra"] = {"rank": rank, **(self.extra or {}), **(kwargs.get("extra") or {})}
        # A second label, in the text, would also keep equal lines from being folded.
        labelled = size == 1 or events.active()
        return (msg if labelled else f"[rank {rank}] {msg}"), kwargs

    def log(  # type: ignore[override]  # the standard's other options are among kwargs
        self,
        level: int,
        msg: object,
        *args: object,
        main_process_only: bool = True,
        in_order: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `Logger.log`.

        Args:
            main_process_only: on rank 0 only.
            in_order: on every rank, one after the other, which makes each wait for the others: to be called on all.
        """
        if not self.isEnabledFor(level):
            return
        rank, size = _place()
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        text, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
        if in_order and size > 1 and dist.is_available() and dist.is_initialized():
            world = join()
            for turn in range(size):
                if turn == rank:
                    self.logger.log(level, text, *args, **kwargs)
                barrier(world)
        elif in_order or rank == 0 or not main_process_only:
            self.logger.log(level, text, *args, **kwargs)

    def warning_once(self, msg: object, *args: object, **kwargs: Any) -> None:
        """`warning`, but nothing at later calls with the same words, from wherever they come."""
        key = (self.logger.name, str(msg), *map(str, args))
        with _lock:
            if key in _warned:
                return
            _warned.add(key)
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.log(logging.WARNING, msg, *args, **kwargs)


def _place() -> tuple[int, int]:
    """Rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    environment = read_environment()
    return environment.rank, environment.size
