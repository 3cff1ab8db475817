"""The order of names that hold numbers."""

from __future__ import annotations

import re

__all__ = ["numbered"]

_DIGITS = re.compile("([0-9]+)")


def numbered(name: str) -> list[str | int]:
    """What names are sorted by so that `layer2` stands before `layer10`."""
    return [int(part) if at % 2 else part for at, part in enumerate(_DIGITS.split(name))]
