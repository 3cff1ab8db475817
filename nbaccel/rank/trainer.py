"""Hugging Face's Trainer in a rank: its steps, where their time goes and what it logs reach whoever watches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Metric, Progress

__all__ = ["relay_trainer"]

_EVERY = 0.1
_SUMMARY = ("runtime", "per_second", "total_flos", "epoch")
"""Endings of names that the Trainer logs and that are no curve."""


def relay_trainer() -> None:
    """Follow every Trainer made from now on."""
    when_imported("transformers.trainer", _follow)


def _follow(module: Any) -> None:
    # a callback must be one of its classes, for it calls them by all of its events
    kind = type("NbaccelFollower", (_Follower, module.TrainerCallback), {})
    module.DEFAULT_CALLBACKS = [*module.DEFAULT_CALLBACKS, kind]


class _Follower:
    """The callback. On the host's clock: `backward` holds the communication of the ranks and the clipping too.

    Not final: it is one of two bases of the class that is used.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, float] = {}
        self._at = self._told = 0.0
        self._entered: float | None = None
        self._in_step = False
        """Elsewhere the model computes for an evaluation."""
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._at = time.perf_counter()
        self._parts.clear()
        if model is not None:
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._enter()),
                model.register_forward_hook(lambda *_: self._leave()),
            ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._add("data")
        self._in_step = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._add("backward")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._add("optimizer")
        self._in_step = False
        self._tell(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at = time.perf_counter()  # what it took is no part of a training step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._add("checkpoint")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        self._at = time.perf_counter()
        values = {
            name: float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and not name.endswith(_SUMMARY)
        }
        if values and state.is_world_process_zero:
            events.emit(Metric(values=values, step=state.global_step, reduced="mean"))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state, last=True)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _enter(self) -> None:
        self._entered = time.perf_counter() if self._in_step else None

    def _leave(self) -> None:
        if self._entered is not None:
            now = time.perf_counter()
            self._parts["forward"] = self._parts.get("forward", 0.0) + now - self._entered
            # of what is counted from the last mark on, this much is counted already
            self._at += now - self._entered
            self._entered = None

    def _add(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._at
        self._at = now

    def _tell(self, state: Any, *, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._told < _EVERY and not last:
            return
        self._told = now
        parts, self._parts = self._parts, {}
        events.emit(
            Progress(
                name="train",
                step=state.global_step,
                total=state.max_steps or None,
                epoch=int(state.epoch) if state.epoch is not None else None,
                unit="step",
                times=parts,
            )
        )
