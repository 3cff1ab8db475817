"""A `__main__` as a notebook has one, for what travels by value."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest


@pytest.fixture
def main() -> Iterator[types.ModuleType]:
    """A `__main__` of our own, as a notebook has one."""
    before = sys.modules["__main__"]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    yield module
    sys.modules["__main__"] = before


def define(main: types.ModuleType, source: str) -> None:
    exec(compile(source, "<cell 1>", "exec"), main.__dict__)
