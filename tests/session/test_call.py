"""One call on its way: what shows it is made when there is something to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbaccel.errors import LaunchError
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Limits
from nbaccel.session.sinks.base import Recorder, Sink
from nbaccel.wire import payload
from nbaccel.wire.events import Event, Output, Returned, Status


def new_call(late: Callable[[], Sequence[Sink]], said: list[str]) -> CallInFlight:
    parcel, _ = payload.pack(None, outward=True)
    return CallInFlight(
        Delivery(parcel=parcel, fd=None, returns="none"),
        [],
        num_ranks=2,
        limits=Limits(),
        say=said.append,
        keep=True,
        late_sinks=late,
    )


def test_late_sinks_are_made_once_when_the_first_rank_prints() -> None:
    made: list[Recorder] = []

    def make() -> list[Sink]:
        made.append(Recorder())
        return [*made]

    call = new_call(make, [])
    quiet: list[Event] = [Status(rank=0, state="running"), Returned(rank=1, call=0)]
    for event in quiet:
        call.handle(event, call.state)
    assert made == []
    printed = [Output(rank=0, stream="stdout", data=b"a\n"), Output(rank=1, stream="stdout", data=b"b\n")]
    for event in printed:
        call.handle(event, call.state)
    call.resolve()
    assert [recorder.events[:2] for recorder in made] == [printed]
    assert made[0].final is call.state


def test_call_goes_on_and_says_so_when_late_sinks_cannot_be_made() -> None:
    said: list[str] = []

    def make() -> list[Sink]:
        raise OSError("no front end")

    call = new_call(make, said)
    for data in (b"a\n", b"b\n"):
        call.handle(Output(rank=0, stream="stdout", data=data), call.state)
    assert said == ["nothing is shown (OSError: no front end); the run goes on"]


def test_caller_is_told_when_the_end_itself_goes_wrong() -> None:
    call = new_call(list, [])
    call.ranks = (7,)  # no such rank: the state cannot take in its end
    call.resolve(LaunchError("the first thing that went wrong"))
    assert isinstance(call.future.exception(timeout=0), LaunchError)
    other = new_call(list, [])
    other.values = {0: (None, -1), 1: (None, None)}  # a descriptor that cannot be closed
    other.resolve()
    assert isinstance(other.future.exception(timeout=0), OSError)
