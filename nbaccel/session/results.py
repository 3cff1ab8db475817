"""The ranks' return values, as a list that shows itself briefly."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, final

__all__ = ["Results", "rank_ranges"]

_MAX_TEXT = 400
_IDENTITY: Any = object.__eq__


@final
class Results(list[Any]):
    """One value per rank, in rank order; None for ranks whose value was not asked for.

    Args:
        values: as a list takes them.
        ranks: which rank each value is from; None is 0, 1, ….

    Shows nothing when all are None, equal values once, and large ones abbreviated.
    """

    def __init__(self, values: Iterable[Any] = (), *, ranks: Sequence[int] | None = None) -> None:
        super().__init__(values)
        self.ranks = ranks

    def __repr__(self) -> str:
        texts = [_brief(value) for value in self]
        if len(set(texts)) == 1 and len(texts) == 1:
            return f"[{texts[0]}]"
        known = self.ranks if self.ranks is not None and len(self.ranks) == len(texts) else range(len(texts))
        groups: list[tuple[str, Any, list[int]]] = []
        for rank, text, value in zip(known, texts, self, strict=True):
            alike = (ranks for other, first, ranks in groups if other == text and _equal(first, value))
            if (ranks := next(alike, None)) is not None:
                ranks.append(rank)
            else:
                groups.append((text, value, [rank]))
        lines = []
        for text, _, ranks in groups:
            label = f"[{rank_ranges(ranks)}] "
            lines.append(label + text.replace("\n", "\n" + " " * len(label)))
        return "\n".join(lines)

    def _ipython_display_(self) -> None:
        if any(value is not None for value in self):
            raise NotImplementedError  # IPython's protocol: show it the ordinary way

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def rank_ranges(ranks: Iterable[int]) -> str:
    """Ranks as a person writes them: "0,2-3"."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values whose short texts are the same are so too, as far as can be told."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if type(one).__eq__ is _IDENTITY:
        return True  # it has no idea of equality but its text
    try:
        if getattr(one, "shape", None) != getattr(other, "shape", None):
            return False
        same = (one == other) | ((one != one) & (other != other))  # NaN
        return bool(same.all() if hasattr(same, "all") else same)
    except Exception:  # noqa: BLE001  # it cannot be compared
        return True


class _Brief(reprlib.Repr):
    """`reprlib`, but for tensors and arrays, whose own repr computes on all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxdict = self.maxlist = self.maxtuple = 6

    def repr_instance(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if isinstance(shape, Sequence) and hasattr(x, "dtype"):
            size = 1
            for extent in shape:
                size *= int(extent)
            if size > 16:
                return f"{type(x).__name__}(shape={tuple(shape)}, dtype={x.dtype})"
        return super().repr_instance(x, level)


_brief_repr = _Brief()


def _brief(value: Any) -> str:
    try:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            text = _brief_repr.repr_instance(value, 4)
        elif type(value) in (list, tuple, dict, set, frozenset, str, bytes):
            text = _brief_repr.repr(value)
        else:
            text = repr(value)
    except Exception as error:  # noqa: BLE001  # a value's broken repr must not hide the others
        return f"<{type(value).__name__}: its repr raised {type(error).__name__}>"
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " …"
