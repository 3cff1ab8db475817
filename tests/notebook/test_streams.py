"""Where a cell's text goes when standard output is a plain file."""

from __future__ import annotations

import io
import sys

import pytest

from nbaccel.notebook.streams import Streams


def test_character_without_a_code_is_escaped(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    streams = Streams()
    streams.write("é → b\n", "stdout")
    streams.write("goes on\n", "stdout")
    sys.stdout.flush()
    assert raw.getvalue() == b"\xe9 \\u2192 b\ngoes on\n"
