"""Questions of ranks: in turn, named, and never left without an answer."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nbaccel.session.prompts import Prompts
from nbaccel.session.state import new_state
from nbaccel.wire.events import Died, Event, InputRequest, Returned

STATE = new_state(2, 0.0)


class Person:
    """Answers, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.replies: list[tuple[int, str, Any]] = []
        self.interrupts = 0
        self.told: list[str] = []

    def interrupt(self) -> None:
        self.interrupts += 1


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Person:
    found = Person()

    def answer(prompt: str = "") -> str:
        found.asked.append(prompt)
        return f"answer {len(found.asked)}"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("getpass.getpass", lambda prompt: f"secret for {prompt}")
    return found


def prompts(person: Person, *, can_ask: bool = True, num_ranks: int = 2) -> Prompts:
    return Prompts(
        lambda *reply: person.replies.append(reply),
        interrupt=person.interrupt,
        can_ask=can_ask,
        num_ranks=num_ranks,
        say=person.told.append,
    )


def test_ranks_are_asked_in_turn_by_the_thread_that_waits(person: Person) -> None:
    made = prompts(person)
    for rank in (1, 0):
        made.handle(InputRequest(rank=rank, id=str(rank), prompt="name? "), STATE)
    assert person.asked == []
    made.meanwhile()
    assert person.asked == ["[rank 1] name? ", "[rank 0] name? "]
    assert person.replies == [(1, "1", "answer 1"), (0, "0", "answer 2")]


def test_one_rank_alone_is_not_named_and_a_password_is_asked_as_one(person: Person) -> None:
    made = prompts(person, num_ranks=1)
    made.handle(InputRequest(rank=0, id="a", prompt="key? ", password=True), STATE)
    made.meanwhile()
    assert person.replies == [(0, "a", "secret for key? ")]


def test_question_is_refused_where_nobody_can_be_asked(person: Person) -> None:
    prompts(person, can_ask=False).handle(InputRequest(rank=1, id="a", prompt=""), STATE)
    ((rank, _, answer),) = person.replies
    assert rank == 1
    assert isinstance(answer, EOFError)
    assert "input() on rank 1" in str(answer)


def test_question_is_refused_when_no_cell_waits_for_the_run(person: Person) -> None:
    made = prompts(person)
    made.handle(InputRequest(rank=0, id="a", prompt=""), STATE)
    made.tick(time.monotonic() + 0.5)
    assert person.replies == []
    made.tick(time.monotonic() + 3)
    assert "result()" in str(person.replies[0][2])


def test_front_end_that_takes_no_input_is_said_to_the_rank(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prompt: str) -> str:
        raise RuntimeError("raw_input was called, but this frontend does not support it")

    monkeypatch.setattr("builtins.input", refuse)
    made = prompts(person)
    made.handle(InputRequest(rank=0, id="a", prompt=""), STATE)
    made.meanwhile()
    assert "does not support" in str(person.replies[0][2])


def test_interrupt_while_asking_reaches_the_rank_and_the_run(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    made = prompts(person)
    made.handle(InputRequest(rank=0, id="a", prompt=""), STATE)
    made.meanwhile()
    assert isinstance(person.replies[0][2], KeyboardInterrupt)
    assert person.interrupts == 1
    assert signal.getsignal(signal.SIGINT) is before


def ended(made: Prompts, how: Event | None) -> Callable[[str], str]:
    """An input box that nobody answers, and below which the relay's thread tells of an end (None: the run's)."""

    def ask(prompt: str) -> str:
        end = (
            functools.partial(made.close, STATE)
            if how is None
            else functools.partial(made.handle, how, STATE)
        )
        threading.Thread(target=end).start()
        assert threading.Event().wait(60), "the question was not withdrawn"
        return ""

    return ask


@pytest.mark.parametrize("how", [Died(rank=1, exitcode=-15), None], ids=["rank", "run"])
def test_open_question_is_withdrawn_when_nobody_waits_for_its_answer(
    person: Person, monkeypatch: pytest.MonkeyPatch, how: Event | None
) -> None:
    before = signal.getsignal(signal.SIGINT)
    made = prompts(person)
    monkeypatch.setattr("builtins.input", ended(made, how))
    for question in ("a", "b"):
        made.handle(InputRequest(rank=1, id=question, prompt=""), STATE)
    made.meanwhile()
    assert person.told == ["rank 1's question is over: its call has ended"]
    assert [reply for reply in person.replies if not isinstance(reply[2], EOFError)] == []
    assert person.interrupts == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_question_stays_open_when_another_rank_has_ended(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prompts(person)

    def ask(prompt: str) -> str:
        made.handle(Returned(rank=0, call=0), STATE)
        return "still here"

    monkeypatch.setattr("builtins.input", ask)
    made.handle(InputRequest(rank=1, id="a", prompt=""), STATE)
    made.meanwhile()
    assert person.replies == [(1, "a", "still here")]


def test_question_is_refused_when_the_run_is_waited_for_in_another_thread(person: Person) -> None:
    made = prompts(person)
    made.handle(InputRequest(rank=0, id="a", prompt=""), STATE)
    later = time.monotonic() + 3
    waiting = threading.Thread(target=made.meanwhile)
    waiting.start()
    waiting.join()
    made.tick(later)
    assert "in the main thread" in str(person.replies[0][2])
