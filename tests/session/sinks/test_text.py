"""Output as text: labels, folding, bars, order, bounds."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.text import TextSink
from nbaccel.session.state import fold, new_state
from nbaccel.wire.events import Died, Event, InputRequest, Output, Returned

STDOUT: Literal["stdout"] = "stdout"
STDERR: Literal["stderr"] = "stderr"


class Screen:
    """A sink with its clock and what it wrote."""

    def __init__(self, num_ranks: int, **options: Any) -> None:
        self.now = 100.0
        self.writes: list[tuple[str, str]] = []
        self.state = new_state(num_ranks, started=0.0)
        self.text_sink = TextSink(
            lambda text, stream: self.writes.append((stream, text)),
            num_ranks=num_ranks,
            clock=lambda: self.now,
            **options,
        )
        self.sink: Sink = self.text_sink

    def event(self, event: Event) -> Screen:
        self.state = fold(self.state, event)
        self.sink.handle(event, self.state)
        return self

    def out(self, rank: int, data: bytes, stream: Literal["stdout", "stderr"] = STDOUT) -> Screen:
        return self.event(Output(rank=rank, stream=stream, data=data))

    def wait(self, seconds: float) -> Screen:
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            self.sink.tick(self.now)
        return self

    def close(self) -> Screen:
        self.sink.close(self.state)
        return self

    def text(self, stream: str | None = None) -> str:
        return "".join(text for name, text in self.writes if stream in (None, name))

    def terminal(self) -> list[str]:
        """What a terminal shows of all that was written."""
        rows = []
        for line in self.text().split("\n"):
            cells: list[str] = []
            for segment in line.split("\r"):
                cells[: len(segment)] = segment
            rows.append("".join(cells).rstrip())
        return rows


def test_lines_all_ranks_print_are_folded_and_come_at_once_when_complete() -> None:
    screen = Screen(4)
    for rank in (2, 0, 3, 1):
        screen.out(rank, b"epoch 1\n")
    screen.wait(0.05)
    assert screen.text() == "[0-3] epoch 1\n"


def test_lines_wait_for_their_likes_no_longer_than_hold() -> None:
    screen = Screen(4).out(0, b"mine\n").out(2, b"shared\n")
    screen.wait(0.05).out(3, b"shared\n").out(0, b"shared\n")
    assert screen.text() == ""
    screen.wait(0.1)
    assert screen.text() == "mine\n[0,2-3] shared\n"
    screen.out(1, b"shared\n").wait(0.15)
    assert screen.text() == "mine\n[0,2-3] shared\n[1] shared\n"


def test_same_line_several_times_is_counted() -> None:
    screen = Screen(2).out(0, b"x\nx\nx\n").out(1, b"x\nx\n").close()
    assert screen.text() == "[0-1] x\n[0-1] x\nx\n"


def test_line_printed_over_and_over_is_told_once_a_second_with_a_count() -> None:
    screen = Screen(2, transient=True).out(1, b"near\n" + b"again\n" * 5000).wait(0.15)
    assert screen.text() == "[1] near\n[1] again ×5000\n"
    for _ in range(50):  # 2.5 seconds
        screen.out(1, b"again\n" * 10).wait(0.05)
    assert re.fullmatch(r"(\[1\] again ×\d+\n){2}", screen.text().partition("5000\n")[2])
    screen.out(1, b"again\nother\n").close()
    assert screen.text().endswith("\n[1] other\n")
    counts = [int(count) for count in re.findall(r"again ×(\d+)", screen.text())]
    assert sum(counts) + screen.text().count("again\n") == 5501


@pytest.mark.parametrize(
    ("num_ranks", "options", "folded"),
    [
        (1, {"transient": True}, True),
        (1, {}, False),  # its text may be read by a program
        (2, {}, True),
        (2, {"mode": "all"}, False),
        (2, {"mode": "rank0", "transient": True}, False),
    ],
)
def test_repeated_lines_are_counted_for_people_only(
    num_ranks: int, options: dict[str, Any], folded: bool
) -> None:
    text = Screen(num_ranks, **options).out(0, b"x\n" * 9).close().text()
    assert text.count("x") == (1 if folded else 9)
    assert ("×9" in text) == folded


def test_empty_lines_stay_as_they_are() -> None:
    assert (
        Screen(1, transient=True).out(0, b"a\n" + b"\n" * 7 + b"b\n").close().text()
        == "a\n" + "\n" * 7 + "b\n"
    )


def test_question_comes_after_all_that_was_printed_before_it() -> None:
    screen = Screen(1, transient=True).out(0, b"x\n" * 9).wait(0.05).out(0, b"x\n" * 3)
    screen.event(InputRequest(rank=0, id="1", prompt="? ", password=False))
    assert screen.text() == "x ×9\nx ×3\n"


def test_same_line_on_different_streams_is_not_folded() -> None:
    screen = Screen(2).out(0, b"x\n").out(1, b"x\n", STDERR).close()
    assert screen.writes == [("stdout", "x\n"), ("stderr", "[1] x\n")]


def test_long_labels_stand_on_every_line() -> None:
    screen = Screen(4, label="long").out(0, b"a\nb\n").out(2, b"b\nc\n").out(3, b"b\n").close()
    assert screen.text() == "[rank 0] a\n[ranks 0,2-3] b\n[rank 2] c\n"


def test_mode_all_labels_every_line_at_once_and_folds_none() -> None:
    screen = Screen(2, mode="all").out(0, b"x\n").out(1, b"x\ny\n").wait(0.05)
    assert screen.text() == "[0] x\n[1] x\n[1] y\n"


def test_mode_rank0_and_none() -> None:
    assert Screen(2, mode="rank0").out(0, b"x\n").out(1, b"y\n").close().text() == "x\n"
    assert Screen(2, mode="none").out(0, b"x\n").out(1, b"y\n").close().text() == ""


@pytest.mark.parametrize("mode", ["auto", "all", "rank0"])
@pytest.mark.parametrize("label", ["short", "long"])
def test_one_rank_has_no_labels_and_does_not_wait(mode: str, label: str) -> None:
    screen = Screen(1, mode=mode, label=label).out(0, b"a\nb\n")
    assert screen.writes == [("stdout", "a\nb\n")]


def test_unfinished_line_comes_out_when_the_call_ends_or_the_rank_dies() -> None:
    screen = Screen(3).out(0, b"no newline").out(1, b"last words", STDERR).out(2, b"tail")
    screen.event(Returned(rank=0, call=1)).event(Died(rank=1, exitcode=-11)).wait(0.15)
    assert screen.writes == [("stdout", "no newline\n"), ("stderr", "[1] last words\n")]
    screen.close().close()
    assert screen.writes[2:] == [("stdout", "[2] tail\n")]


def test_line_is_never_split_between_ranks() -> None:
    screen = Screen(2, mode="all")
    screen.out(0, b"first half, ").out(1, b"whole\n").wait(0.1).out(0, b"second half\n").close()
    assert screen.text() == "[1] whole\n[0] first half, second half\n"


def test_many_lines_go_out_in_few_writes() -> None:
    screen = Screen(2)
    for i in range(1000):
        screen.out(i % 2, b"line %d\n" % i)
    screen.wait(0.2)
    assert screen.text().count("\n") == 1000
    assert len(screen.writes) <= 3


def test_ten_megabytes_without_a_newline_come_out_unbroken() -> None:
    screen = Screen(2)
    for i in range(160):
        screen.out(1, bytes([97 + i % 26]) * 65_000).wait(0.05)
    screen.close()
    expected = "".join(chr(97 + i % 26) * 65_000 for i in range(160))
    assert screen.text() == f"[1] {expected}\n"


def test_long_line_is_ended_before_another_ranks_line() -> None:
    screen = Screen(2, mode="all").out(1, b"x" * 70_000).wait(0.1)
    screen.out(0, b"other\n", STDERR).wait(0.1).out(1, b"end\nnext\n").close()
    assert screen.writes == [
        ("stdout", "[1] " + "x" * 65_536),
        ("stdout", "\n"),
        ("stderr", "[0] other\n"),
        ("stdout", "[1] " + "x" * (70_000 - 65_536) + "end\n[1] next\n"),
    ]


def test_bar_appears_once_in_its_final_state_when_nothing_is_live() -> None:
    screen = Screen(2)
    for i in range(101):
        screen.out(0, b"\r%3d%%" % i, STDERR).out(1, b"\r%3d%% of mine" % i, STDERR).wait(0.05)
    assert screen.text() == ""
    screen.out(0, b"\n", STDERR).out(1, b"\n", STDERR).close()
    assert screen.writes == [("stderr", "100%\n[1] 100% of mine\n")]


def test_bar_is_painted_in_place_at_most_four_times_a_second() -> None:
    screen = Screen(2, transient=True)
    for i in range(40):  # two seconds
        screen.out(1, b"\r2nd %d" % i, STDERR).out(0, b"\rbar %d" % i, STDERR).wait(0.05)
    painted = [text for _, text in screen.writes]
    assert painted[0] == "bar 0"
    assert 4 <= len(painted) <= 9
    assert all(re.fullmatch(r"\rbar \d+", text) for text in painted[1:])
    screen.out(0, b"\rdone  \n", STDERR).wait(0.15)
    assert screen.terminal()[0] == "done"
    screen.close()
    assert screen.terminal() == ["done", "[1] 2nd 39", ""]


def test_bar_is_cleared_before_a_line_and_painted_again_after_it() -> None:
    screen = Screen(2, transient=True).out(0, b"\rworking 50%").wait(0.3)
    assert screen.terminal() == ["working 50%"]
    screen.out(1, b"hello\n").wait(0.15)
    assert screen.terminal() == ["[1] hello", "working 50%"]
    screen.out(0, b"\rbye        \n").wait(0.15).close()
    assert screen.terminal() == ["[1] hello", "bye", ""]


def test_shorter_bar_is_padded_over_the_longer_one() -> None:
    screen = Screen(1, transient=True).out(0, b"\rloading everything").wait(0.3)
    screen.out(0, b"\rok" + b" " * 20).wait(0.3)
    assert screen.writes[-1] == ("stdout", "\rok" + " " * 16)
    assert screen.terminal() == ["ok"]


def test_interrupted_bar_moves_to_the_stream_of_the_line_and_ends_on_its_own() -> None:
    screen = Screen(1, transient=True).out(0, b"\r10%", STDERR).wait(0.3).out(0, b"loss 3\n").wait(0.3)
    screen.out(0, b"\r20%", STDERR).wait(0.3).out(0, b"loss 2\n").wait(0.3).out(0, b"\r30%\n", STDERR).close()
    assert screen.text("stderr") == "10%\r   \r30%\n"
    assert screen.text("stdout") == "loss 3\n10%\r20%\r   \rloss 2\n20%\r   \r"


def test_bar_is_cut_to_the_terminals_width() -> None:
    screen = Screen(4, transient=True, label="long", columns=20)
    screen.out(2, b"\r\x1b[32m" + b"#" * 50 + b"\x1b[0m").wait(0.3)
    assert screen.text() == "[rank 2] \x1b[32m" + "#" * 10 + "\x1b[0m"


def test_bar_that_wipes_itself_out_leaves_nothing() -> None:
    screen = Screen(1, transient=True).out(0, b"\r50%", STDERR).wait(0.3).out(0, b"\r   \r", STDERR).wait(0.3)
    screen.close()
    assert screen.terminal() == [""]


def test_unfinished_line_is_shown_where_it_can_be_painted_over() -> None:
    screen = Screen(2, transient=True).out(0, b"loading ...").wait(0.3)
    assert screen.text() == "loading ..."
    screen.out(0, b" done\n").wait(0.15)
    assert screen.terminal() == ["loading ... done", ""]


RANKS = 3
LINES = st.lists(
    st.tuples(
        st.integers(0, RANKS - 1),
        st.lists(st.sampled_from(["", "a", "b", "cc", "1%\r2%"]), min_size=1, max_size=4).flatmap(
            lambda texts: st.sampled_from([texts, texts[:1] * 9])
        ),
        st.sampled_from([STDOUT, STDERR]),
        st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    ),
    max_size=30,
)
LABELLED = re.compile(r"(?:\[([\d,-]+)\] )?(.*?)(?: ×(\d+))?")


def ranks_of(label: str) -> list[int]:
    spans = [span.split("-") for span in label.split(",")]
    return [rank for span in spans for rank in range(int(span[0]), int(span[-1]) + 1)]


@given(LINES, st.sampled_from(["auto", "all"]), st.booleans())
def test_each_ranks_lines_can_be_read_back_in_order(
    printed: list[tuple[int, list[str], Literal["stdout", "stderr"], float]], mode: str, transient: bool
) -> None:
    screen = Screen(RANKS, mode=mode, transient=transient)
    expected: list[list[tuple[str, str]]] = [[] for _ in range(RANKS)]
    for rank, texts, stream, pause in printed:
        screen.out(rank, "".join(f"{text}\n" for text in texts).encode(), stream).wait(pause)
        expected[rank] += [(stream, text.split("\r")[-1]) for text in texts]
    screen.close()
    found: list[list[tuple[str, str]]] = [[] for _ in range(RANKS)]
    for stream, text in screen.writes:
        assert text.endswith("\n")
        for line in text[:-1].split("\n"):
            match = LABELLED.fullmatch(line)
            assert match is not None
            for rank in ranks_of(match[1]) if match[1] else [0]:
                found[rank] += [(stream, match[2])] * int(match[3] or 1)
    assert found == expected


@pytest.mark.parametrize("alike", [True, False])
def test_flood_is_shown_whole_in_bounded_memory(alike: bool) -> None:
    state = new_state(2, started=0.0)
    counted = [0, 0]

    def write(text: str, stream: str) -> None:
        counted[0] += text.count("\n")
        counted[1] = max(counted[1], len(text))

    sink = TextSink(write, num_ranks=2, clock=lambda: 0.0)  # nobody ticks, and no time passes
    tracemalloc.start()
    try:
        for batch in range(200):
            for rank in range(2):
                name = b"" if alike else b"%d " % rank
                data = b"".join(b"%sline %d\n" % (name, batch * 500 + i) for i in range(500))
                sink.handle(Output(rank=rank, stream="stdout", data=data), state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sink.close(state)
    assert counted[0] == (100_000 if alike else 200_000)
    assert counted[1] < 8 << 20
    assert peak < 20_000_000  # unbounded it would be 30 MB
