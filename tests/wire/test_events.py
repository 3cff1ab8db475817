"""Events cross a channel whole."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from nbaccel.wire import events
from nbaccel.wire.events import Event, ExceptionInfo, Frame

FRAME = Frame("train.py", 3, "train", "loss.backward()")
INFO = ExceptionInfo("ValueError", "ValueError: no", (FRAME,))
EVENTS: list[Event] = [
    events.Applied(option="mixed_precision", value="bf16", rank=2),
    events.CommMessage(kind="comm_msg", comm="a", buffers=(b"1",)),
    events.Died(exitcode=-9, detail="it was killed", asked=True),
    events.Concluded(problem="not all ranks were ready in 2 s"),
    events.Display(data={"text/plain": "1"}, name="here", update=True),
    events.Halted(step=120),
    events.Heartbeat(memory=3, doing="waiting"),
    events.InputRequest(id="1", prompt="? "),
    events.Joined(replicas={"model": "f00"}),
    events.Knob(name="lr", value=0.1, step=4, low=0.0),
    events.Metric(values={"loss": 0.5}, step=3, reduced="mean"),
    events.Output(stream="stderr", data=b"\xff"),
    events.Progress(name="train", step=1, total=3, times={"data": 0.1}),
    events.Raised(call=1, info=INFO),
    events.Returned(call=1, value=(1, 2), collectives=7),
    events.Stalled(text="rank 1 waits"),
    events.Status(state="idle", pid=4),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_is_the_same_when_it_has_crossed(event: Event) -> None:
    again = pickle.loads(pickle.dumps(event, protocol=5))
    assert type(again) is type(event)
    assert again == event
    with pytest.raises(FrozenInstanceError):
        again.rank = 3


def test_every_kind_of_event_is_tried() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
