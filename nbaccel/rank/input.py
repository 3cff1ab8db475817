"""`input()`, `getpass` and pdb in a rank: the question goes to the cell, the rank waits for the line."""

from __future__ import annotations

import builtins
import itertools
import sys
from typing import Any, Protocol

from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import InputRequest

__all__ = ["Replies", "relay_input"]

_numbers = itertools.count()


class Replies(Protocol):
    """Where answers arrive."""

    def wait_reply(self, id: str) -> Any:
        """The answer to the question of this id: a line, or an exception."""


def relay_input(replies: Replies) -> None:
    """Make `input` and `getpass.getpass` ask in the notebook from now on."""

    def ask(prompt: object, *, password: bool) -> str:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        question = InputRequest(id=str(next(_numbers)), prompt=str(prompt), password=password)
        events.emit(question)
        answer = replies.wait_reply(question.id)
        if isinstance(answer, BaseException):
            raise answer
        return str(answer)

    def input(prompt: object = "", /) -> str:
        return ask(prompt, password=False)

    def getpass(prompt: str = "Password: ", stream: Any = None, **_: Any) -> str:
        return ask(prompt, password=True)

    def replace(module: Any) -> None:
        module.getpass = getpass

    builtins.input = input
    when_imported("getpass", replace)
