"""A rank's exception in words, for whoever cannot see its frames."""

from __future__ import annotations

import linecache
import os
import traceback
from types import TracebackType

from nbaccel.wire.events import ExceptionInfo, Frame

__all__ = ["describe"]

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What stands around the user's call; the training core is part of what they called.
_OURS = {os.path.join(_HOME, room) for room in ("rank", "wire")}
_MAX_FRAMES = 60
_MAX_CHAIN = 5
_MAX_GROUP = 8
_MAX_MESSAGE = 20_000  # characters
# What torch says, and what it means to who wrote the loop.
_MEANINGS = {
    "got mixed torch.Tensor and DTensor": (
        "Each rank has a part of these parameters (DTensors), and they are whole only while the prepared model itself "
        "is called: not in another method of it, in one of its layers called directly, or in a loss computed from its "
        "parameters. See 'What does not go' in docs/strategies.md."
    ),
    "Expected to have finished reduction in the prior iteration": (
        "In the step before, parameters of the model had no part in the loss: layers that are frozen within a pass (a "
        "loop over a prepared loader; between passes goes), or that some batches do not use. "
        "Accelerator(ddp=DDPOptions(find_unused_parameters=True)) allows both."
    ),
}


def describe(error: BaseException, *, depth: int = 0) -> ExceptionInfo:
    """`error`, its frames with their source lines, and what it was raised from."""
    cause = context = None
    if depth < _MAX_CHAIN:
        if error.__cause__ is not None:
            cause = describe(error.__cause__, depth=depth + 1)
        elif error.__context__ is not None and not error.__suppress_context__:
            context = describe(error.__context__, depth=depth + 1)
    inner: tuple[BaseException, ...] = ()
    # by name: Python 3.10 has it from a package
    if depth < _MAX_CHAIN and any(base.__name__ == "BaseExceptionGroup" for base in type(error).__mro__):
        inner = getattr(error, "exceptions", ())[:_MAX_GROUP]
    kind = type(error)
    said = "".join(traceback.format_exception_only(kind, error)).rstrip("\n")
    meanings = [meaning for words, meaning in _MEANINGS.items() if words in said]
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return ExceptionInfo(
        type_name=f"{module}{kind.__qualname__}",
        message="\n".join([_bounded(said), *meanings]),
        frames=_frames(error.__traceback__),
        cause=cause,
        context=context,
        exceptions=tuple(describe(one, depth=depth + 1) for one in inner),
    )


def _bounded(message: str) -> str:
    if len(message) <= _MAX_MESSAGE:
        return message
    half = _MAX_MESSAGE // 2
    return f"{message[:half]} … {len(message) - 2 * half} characters … {message[-half:]}"


def _frames(tb: TracebackType | None) -> tuple[Frame, ...]:
    """The frames of the user's code and of libraries; not ours around the call."""
    found = []
    for frame, lineno in traceback.walk_tb(tb):
        code = frame.f_code
        if os.path.dirname(code.co_filename) in _OURS:
            continue
        source = linecache.getline(code.co_filename, lineno, frame.f_globals).strip()
        found.append(Frame(code.co_filename, lineno, getattr(code, "co_qualname", code.co_name), source))
    if len(found) > _MAX_FRAMES:  # a recursion: its middle says nothing
        half = _MAX_FRAMES // 2
        hidden = Frame("", 0, f"… {len(found) - 2 * half} frames …", "")
        found = [*found[:half], hidden, *found[-half:]]
    return tuple(found)
