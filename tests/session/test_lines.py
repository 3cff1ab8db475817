"""The line splitter: what a terminal would show, whatever the pieces."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbaccel.session.lines import Lines, fit, visible


def split(*chunks: bytes, limit: int = 1 << 16) -> list[str]:
    lines = Lines(limit)
    out = [line for chunk in chunks for line in lines.feed(chunk)]
    return out + lines.finish()


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"a\nb\n", ["a\n", "b\n"]),
        (b"a\nb", ["a\n", "b\n"]),
        (b"\n\n", ["\n", "\n"]),
        (b"", []),
        (b"dos\r\nline\r\n", ["dos\n", "line\n"]),
        (b"10%\r20%\r100%\n", ["100%\n"]),
        (b"abcdef\rxy\n", ["xycdef\n"]),
        (b"long text\rshort    \n", ["short\n"]),
        (b"bar\r   \r", []),
        (b"bar\r   \rnext\n", ["next\n"]),
        (b"kept  \r\n", ["kept  \n"]),
        (b"a\x0bb\x0cc\xc2\x85d\n", ["a\x0bb\x0cc\x85d\n"]),
        (b"\xff\xfeok\n", ["\ufffd\ufffdok\n"]),
        (b"cut \xe2\x82", ["cut \ufffd\n"]),
        (b"\x1b[31mred\x1b[0m\n", ["\x1b[31mred\x1b[0m\n"]),
        (b"\x1b[31mhello\x1b[0m\rhi\n", ["hillo\x1b[0m\n"]),
        (b"hello\r\x1b[32mhi\x1b[0m\n", ["\x1b[32mhi\x1b[0mllo\n"]),
        (b"hello\rhi\x1b[K\n", ["hi\n"]),
        (b"hello\x1b[2K\rhi\n", ["hi\n"]),
        (b"hello\r\x1b[2Khi\n", ["hi\n"]),
    ],
)
def test_lines_are_what_a_terminal_shows(data: bytes, shown: list[str]) -> None:
    assert split(data) == shown


ATOMS = st.sampled_from(
    [
        b"a",
        b"bc",
        b"  ",
        b"\n",
        b"\r",
        b"\r\n",
        "é€".encode(),
        b"\xff",
        b"\xe2\x82",
        b"\x1b[31m",
        b"\x1b[K",
        b"\x1b[2K",
    ]
)


@given(
    st.lists(ATOMS, max_size=40).map(b"".join),
    st.lists(st.integers(0, 80), max_size=6),
    st.sampled_from([4, 7, 999]),
)
def test_lines_are_the_same_however_the_bytes_are_cut(data: bytes, cuts: list[int], limit: int) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[a:b] for a, b in itertools.pairwise(places)]
    bytewise = [data[i : i + 1] for i in range(len(data))]
    assert split(*chunks, limit=limit) == split(data, limit=limit) == split(*bytewise, limit=limit)


@given(st.binary(max_size=200).map(lambda data: data.replace(b"\r", b"")), st.sampled_from([3, 999]))
def test_text_without_rewinding_is_kept_to_the_character(data: bytes, limit: int) -> None:
    text = "".join(split(data, limit=limit))
    expected = data.decode("utf-8", "replace")
    assert text == (expected if not expected or expected.endswith("\n") else expected + "\n")


@given(st.lists(st.text("abc \r", max_size=12), max_size=6))
def test_rewinding_overwrites_cell_by_cell(lines: list[str]) -> None:
    def screen(line: str) -> str:
        cells: list[str] = []
        for segment in line.split("\r"):
            cells[: len(segment)] = segment
        return "".join(cells)

    got = split("".join(line + "\n" for line in lines).encode())
    assert [line.rstrip(" \n") for line in got] == [screen(line).rstrip(" ") for line in lines]


def test_ten_megabytes_without_a_newline_come_out_whole_in_bounded_memory() -> None:
    chunk = bytes(range(97, 123)) * 2520
    lines, length, checksum = Lines(), 0, 0
    tracemalloc.start()
    try:
        for _ in range(160):
            for piece in lines.feed(chunk):
                assert len(piece) == 1 << 16
                length += len(piece)
                checksum += piece.count("q")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (rest,) = lines.finish()
    assert length + len(rest) - 1 == 160 * len(chunk)
    assert checksum + rest.count("q") == 160 * 2520
    assert peak < 2_000_000


def test_a_bar_rewritten_a_million_times_is_one_line_in_bounded_memory() -> None:
    lines = Lines()
    chunk = b"".join(b"\r%3d%%" % (i % 100) for i in range(1000))
    tracemalloc.start()
    try:
        for _ in range(1000):
            assert lines.feed(chunk) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines.rewritten
    assert lines.pending == " 99%"
    assert lines.feed(b"\r100%\n") == ["100%\n"]
    assert not lines.rewritten
    assert peak < 2_000_000


def test_escapes_rewritten_for_ever_do_not_pile_up() -> None:
    lines = Lines()
    lines.feed(b"hello\r" + b"\x1b[31m\r" * 10_000)
    assert len(lines.pending) < 30


def test_fit_cuts_to_columns_and_keeps_only_colours() -> None:
    assert fit("\x1b[A\x1b[31mhello\x1b[0m", 3) == "\x1b[31mhel\x1b[0m"
    assert fit("hello\x1b[A", 5) == "hello"
    assert visible("\x1b[31mhello\x1b[0m") == 5


def test_line_wiped_out_leaves_no_trace_on_the_next_one() -> None:
    data = b"abc\r\x1b[2K\rdef\nkept  \r\n"
    assert split(data) == ["def\n", "kept  \n"]
    assert split(b"abc\r\x1b[2K\r", b"def\n", b"kept  \r\n") == ["def\n", "kept  \n"]
