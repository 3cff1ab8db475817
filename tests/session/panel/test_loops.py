"""Loops in loops: which is shown, what it stands in, how long it all takes; tqdm's bars as a rank tells them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from nbaccel import launch
from nbaccel.session.panel.figures import number, scaled, speed
from nbaccel.session.panel.reading import Row
from nbaccel.wire.events import Event, Progress
from tests.session.panel.streams import nested, started, view


def bar(name: str, time: float, step: float, total: float | None, **known: object) -> Progress:
    return Progress(rank=0, time=time, name=name, step=step, total=total, **known)  # type: ignore[arg-type]


def row(*events: Event) -> Row:
    return view(1, iter([*started(1), *events])).rows[0]


def test_time_left_is_that_of_the_outermost_loop() -> None:
    seen = view(1, nested(), now=10.0)
    assert (seen.rows[0].loop, seen.rows[0].outer) == ("batches", ("epochs 0/3",))
    assert seen.left == pytest.approx(2.5 + 2 * 5)  # half an epoch, and two as long as this one
    assert seen.rate == pytest.approx(2)
    later = row(*nested(), bar("epochs", 9, 1, 3, depth=0), bar("batches", 9, 0, 10, depth=1))
    assert later.left == pytest.approx(5 + 8)  # an epoch takes eight seconds with what is around its batches


def test_three_levels_are_told_outermost_first() -> None:
    seen = row(bar("trials", 0.9, 0, 2, depth=0), *list(_deeper(nested())))
    assert seen.outer == ("trials 0/2", "epochs 0/3")
    assert seen.left == pytest.approx(12.5 + 15)


def _deeper(events: Iterable[Event]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Progress):
            yield bar(event.name, event.time, event.step, event.total, depth=(event.depth or 0) + 1)


def test_bar_that_was_closed_before_its_end_is_not_gone_on_with() -> None:
    seen = row(
        bar("warm-up", 1, 0, 100, depth=0),
        bar("warm-up", 2, 10, 100, depth=0, ended=True),
        bar("train", 2, 0, 10, depth=0),
        bar("train", 2.5, 1, 10, depth=0),
    )
    assert (seen.loop, seen.outer) == ("train", ())


def test_bar_drawn_around_a_loader_is_the_same_loop() -> None:
    events: list[Event] = [bar("epochs", 1, 0, 10, depth=0)]
    for step in range(6):
        events.append(bar("tqdm", 1 + step, step, 10, depth=1))
        events.append(bar("train", 1 + step, step, 10, times={"forward": 0.5}))
    assert row(*events).outer == ()  # ten epochs of ten batches: not told apart yet
    more = [*events, bar("epochs", 11, 1, 10, depth=0), bar("train", 11.1, 1, 10, times={"forward": 0.5})]
    assert (row(*more).loop, row(*more).outer) == ("train", ("epochs 1/10",))


def test_bar_after_another_one_of_its_name_has_a_pace_of_its_own() -> None:
    prepared = [bar("loop", at / 10, at * 80_000, 800_000, depth=0, serial=1) for at in range(1, 11)]
    for name, other in {"shorter": 60, "as long": 800_000}.items():
        began = bar("loop", 1.1, 0, other, depth=0, serial=2)
        assert (row(*prepared, began).speed, row(*prepared, began).left) == ("", None), name
        assert row(*prepared, began, bar("loop", 3.1, 10, other, depth=0, serial=2)).rate == 5


def test_bar_made_anew_in_a_loop_begins_as_fast_as_the_one_before() -> None:
    known: dict[str, object] = {"depth": 1, "unit": "file"}
    epochs = [bar("epochs", 0, 0, 3, depth=0), bar("loop 2", 0, 0, 10, serial=1, **known)]
    epochs += [bar("loop 2", 2, 10, 10, serial=1, ended=True, **known), bar("epochs", 2.5, 1, 3, depth=0)]
    again = row(*epochs, bar("loop 2", 2.5, 0, 10, serial=2, **known))
    assert (again.loop, again.speed, again.left) == ("loop 2", "5 file/s", 2 + 2.5)
    slower = [bar("loop 2", 2.5 + 2 * step, step, 10, serial=2, **known) for step in range(2)]
    assert row(*epochs, *slower).rate == 0.5
    other = {**known, "unit": "B"}
    assert row(*epochs, bar("loop 2", 2.5, 0, 10, serial=2, **other)).loop == "epochs"


def test_bar_of_the_same_name_as_the_loader_it_is_drawn_around_is_another_loop() -> None:
    events: list[Event] = []
    for step in range(6):
        events.append(bar("train", 1 + step, step, 30, depth=0, serial=1, note="loss=0.5"))
        events.append(bar("train", 1 + step, step, 10, times={"forward": 0.5}))
    seen = row(*events)
    assert (seen.loop, seen.steps, seen.speed) == ("train", "5/10", "1 it/s")
    assert seen.outer == ("train 5/30",)
    assert (seen.metrics, dict(seen.parts)["forward"]) == ((("loss", 0.5),), 0.5)
    assert row(*events, bar("train", 7, 6, 30, depth=0, serial=1, ended=True)).steps == "5/10"


def test_values_beside_bars_come_after_those_logged_and_once() -> None:
    seen = row(
        bar("epochs", 1, 1, 3, depth=0, note="loss=9, best=0.25"),
        bar("batches", 1, 1, 10, depth=1, note="loss=0.5, lr=1e-05, stage=two"),
        bar("batches", 2, 2, 10, depth=1, note="loss=0.4, lr=1e-05, stage=two"),
    )
    assert seen.metrics == (("loss", 0.4), ("lr", 1e-5), ("best", 0.25))
    assert seen.words == "stage=two"


def test_figures_of_a_bar_with_prefixes() -> None:
    seen = row(
        bar("file", 1, 0, 5_000_000, unit="B", divisor=1000),
        bar("file", 2, 2_540_000, 5_000_000, unit="B", divisor=1000),
    )
    assert (seen.steps, seen.speed) == ("2.54M/5M", "2.54 MB/s")
    assert scaled(1536, 1024) == ("1.5", "k")
    assert scaled(999.6e15, 1000, 3) == ("1000", "P")
    assert speed(2540.4, "it", None) == "2540 it/s"
    assert [number(value) for value in (12345.6, 999_999.7, 1e6 + 0.5)] == ["12346", "1000000", "1e+06"]


# ── of a rank ─────────────────────────────────────────────────────────────────────────────────────────


def bars() -> None:
    import time

    from tqdm.auto import tqdm, trange

    for _ in trange(2, desc="epochs"):
        batches = tqdm(range(3), desc="batches", leave=False)
        for step in batches:
            time.sleep(0.11)
            batches.set_postfix(loss=0.5 + step)
    with tqdm(total=1.0, desc="share") as share:
        share.update(0.1)
        share.update(0.25)
    with tqdm(total=5000, desc="bytes", unit="B", unit_scale=True, unit_divisor=1024) as file:
        file.update(2540)
    with tqdm(total=4, desc="halves", unit_scale=0.5) as halves:
        halves.update(3)
    with tqdm(range(3)) as changing, tqdm(total=1, desc="held") as held, tqdm(desc="held"):
        for step in changing:
            time.sleep(0.11)
            changing.set_description(f"Epoch 1 loss {step / 2}")
        held.set_description("stage=2, best=9")


def test_bars_of_a_rank_tell_all_of_themselves(clean: None) -> None:
    run = launch(bars, num_processes=1, folder=False)
    run.result()
    told = run.state.ranks[0].progress
    assert {name: (bar.step, bar.total) for name, bar in told.items()} == {
        "epochs": (2, 2),
        "batches": (3, 3),
        "share": (0.35, 1),
        "bytes": (2540, 5000),
        "halves": (1.5, 2),
        "loop": (3, 3),
        "held": (0, 1),
        "held 2": (0, None),
    }
    assert [told[name].depth for name in ("epochs", "batches", "share")] == [0, 1, 0]
    assert all(bar.ended for bar in told.values())
    assert (told["bytes"].divisor, told["share"].divisor, told["halves"].divisor) == (1024, None, None)
    assert told["batches"].note == "loss=2.5"
    called = {name: (bar.label, bar.note) for name, bar in told.items() if bar.label is not None}
    assert called == {
        "loop": ("Epoch 1 loss", "Epoch 1 loss 1.0"),
        "held": ("loop 2", "stage=2, best=9"),
        "held 2": ("held", ""),
    }
    serials = [bar.serial for bar in told.values()]
    assert len({*serials}) == len(serials)
    assert dict(run.report().values["ranks"][0]["metrics"])["loss"] == 2.5
