"""Two runs side by side, from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.comparing import compare
from nbaccel.session.curves import Curve, aligned
from nbaccel.session.environment import probe
from nbaccel.session.facts import run_facts
from nbaccel.session.resolve import resolve
from nbaccel.session.runs import new_folder
from nbaccel.session.sinks.folder import FolderSink
from nbaccel.session.state import fold, new_state
from nbaccel.wire.events import Applied, Event, Metric
from tests.session.panel.streams import returned, started
from tests.session.panel.test_panel_html import HOSTILE, Tags


def write(
    root: Path, name: str, losses: list[float], *, lr: str, seed: int, extra: str = "", **facts: Any
) -> Path:
    """A run's folder as a launch leaves it."""
    folder = new_folder(root, name)
    run = {
        **facts,
        "name": name,
        "cell": f"lr = {lr}\nlaunch(train)\n",
        "versions": {"torch": "2.13.0"},
        "plan": {"num_processes": 2, "device": "cpu"},
    }
    sink = FolderSink(folder, config={"seed": seed, "sources": {"seed": "x"}}, run=run)
    events: list[Event] = [
        *started(2),
        Applied(rank=0, time=1.0, option="config.lr", value=lr),
        *(
            Metric(
                rank=rank,
                time=2.0 + step,
                values={"loss": loss + rank, **({extra: 1.0} if extra else {})},
                step=step,
            )
            for step, loss in enumerate(losses)
            for rank in range(2)
        ),
        *returned(2),
    ]
    state = new_state(2, 0.0)
    for event in events:
        state = fold(state, event)
        sink.handle(event, state)
    sink.tick(1.0)
    sink.close(state)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write(tmp_path, "first", [4.0, 3.0, 2.0], lr="0.1", seed=1),
        write(tmp_path, "second", [4.0, 2.0, 1.0, 0.5], lr="0.2", seed=1, extra="accuracy"),
    )


def test_differences_and_last_values_are_told(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    assert found.differences == {"config.lr": ("0.1", "0.2")}
    assert found.metrics == {"loss": (2.5, 1.0), "accuracy": (None, 1.0)}
    text = repr(found)
    assert "config.lr: 0.1 | 0.2" in text
    assert "code: 1 lines of a, 1 of b" in text
    assert text.splitlines()[0].startswith("a  first · done · 2 ranks on cpu")
    assert len(text.splitlines()) <= 40


def test_page_draws_both_curves_with_plain_tags_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shown = compare(*pair)._repr_mimebundle_()["text/html"]
    found = Tags(shown)
    assert found.tags <= {"div", "span", "b", "i", "details", "summary"}
    assert found.attributes <= {"style"}
    assert shown.count("background-color:#3b8fd0") > 10
    assert shown.count("background-color:#e69f00") > 10
    assert "-60.0%" in found.words
    assert "+lr = 0.2" in found.words
    page = compare(*pair).save_html(tmp_path / "page.html").read_text()
    assert shown in page


def test_same_run_differs_in_nothing(pair: tuple[Path, Path]) -> None:
    found = compare(pair[0], str(pair[0]))
    assert found.differences == {}
    assert "nothing known about them differs" in repr(found)


def test_arguments_are_told_apart_to_their_last_digit(tmp_path: Path) -> None:
    def train(lr: float, net: dict[str, int], *sizes: int, **others: Any) -> None: ...

    plan, environment = resolve(RunConfig(device="cpu", num_processes=1), here := probe()), here

    def folder(name: str, *args: Any, **kwargs: Any) -> Path:
        facts = run_facts(train, name, None, plan, environment, args, kwargs)()
        return write(tmp_path, name, [1.0], lr="1", seed=1, arguments=facts["arguments"])

    one = folder("one", 0.1234567, {"width": 8}, 1, device="x", on=True)
    two = folder("two", 0.1234568, {"width": 9}, 1, 2, device="y", on=1, model=object())
    assert compare(one, two).differences == {
        "argument.lr": ("0.1234567", "0.1234568"),
        "argument.net.width": ("8", "9"),
        "argument.sizes": ("(1,)", "(1, 2)"),
        "argument.others.device": ("x", "y"),
        "argument.others.on": ("True", "1"),
        "argument.others.model": (None, "<object object>"),
    }
    commands = [{"arguments": ["--lr", lr]} for lr in ("1", "2")]
    one, two = (write(tmp_path, "cli", [1.0], lr="1", seed=1, command=command) for command in commands)
    assert compare(one, two).differences == {"command line": ("--lr, 1", "--lr, 2")}


def test_run_that_is_still_starting_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Starting:
        folder = new_folder(tmp_path, "begun")

    with pytest.raises(ConfigError, match="is still starting: its folder does not say yet"):
        compare(pair[0], Starting())


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    one = write(tmp_path, HOSTILE, [1.0, 2.0], lr=HOSTILE, seed=1, extra=HOSTILE)
    two = write(tmp_path, "b", [1.0, 2.0], lr="0.1", seed=2)
    shown = compare(one, two)._repr_mimebundle_()["text/html"]
    assert Tags(shown).tags <= {"div", "span", "b", "i", "details", "summary"}


def test_runs_that_are_not_there_are_named(tmp_path: Path) -> None:
    class Unkept:
        folder = None

    with pytest.raises(ConfigError, match="no run"):
        compare(str(tmp_path / "nothing"), "either")
    with pytest.raises(ConfigError, match="no run folder"):
        compare(Unkept(), Unkept())
    wrong: Any = 3
    with pytest.raises(ConfigError, match="takes runs, their names or folders, not 3"):
        compare(wrong, wrong)


def test_columns_of_two_curves_share_their_steps() -> None:
    def curve(points: list[tuple[int, float]]) -> Curve:
        made = Curve()
        for step, value in points:
            made = made.add(step, value)
        return made

    long, short = aligned([[curve([(0, 0.0), (10, 10.0)])], [curve([(0, 5.0), (5, 5.0)])]], 10)
    assert [one is not None for one in long] == [True] * 10
    assert [one is not None for one in short] == [True] * 6 + [False] * 4
    assert aligned([[], []], 4) == [[], []]
    nothing: Any = aligned([[curve([(3, 1.0)])], []], 4)
    assert nothing == [[(1.0, 1.0, 1.0)], [None]]
