"""`nbaccel test`: a real training on this machine's ranks, its numbers checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from nbaccel.errors import NbaccelError
from nbaccel.session.request import make_request
from nbaccel.session.session import start_run

__all__ = ["test"]

_EXACT = 1e-5
_ROUGH = 0.05
_NOT_COMPARED = "not compared: a training before it failed"


@click.command()
@click.option(
    "-n", "--num-processes", type=click.Choice(["2", "4"]), default="2", show_default=True, help="Ranks."
)
@click.option("--device", metavar="KIND", help="auto, cpu, cuda or xpu.")
def test(num_processes: str, device: str | None) -> int:
    """Train a small model on 1 rank and on N ranks of this machine, and compare.

    Exit code 1 when a number is wrong or a launch fails.
    """
    ranks = int(num_processes)
    wrong = 0
    found: dict[str, Any] = {}
    for title, check in _checks(ranks, device, found):
        began = time.monotonic()
        try:
            problem = check()
        except NbaccelError as error:
            problem = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - began
        mark = click.style("✗", fg="red") if problem else click.style("✓", fg="green")
        click.echo(f"{mark} {title} ({seconds:.1f} s)")
        if problem:
            click.echo("    " + problem.replace("\n", "\n    "))
            wrong += 1
    click.echo("everything agrees" if not wrong else f"{wrong} check(s) failed; `nbaccel env` for the report")
    return 1 if wrong else 0


def _checks(
    ranks: int, device: str | None, found: dict[str, Any]
) -> list[tuple[str, Callable[[], str | None]]]:
    def one() -> str | None:
        found["one"] = _train(1, device)[0]
        return None

    def several() -> str | None:
        values = found["several"] = _train(ranks, device)
        places = [(value["rank"], value["size"]) for value in values]
        if places != [(rank, ranks) for rank in range(ranks)]:
            return f"the ranks say they are {places}"
        return None

    def same_losses() -> str | None:
        return _differs("losses", found, _EXACT)

    def same_weights() -> str | None:
        if "several" not in found:
            return _NOT_COMPARED
        norms = {value["norm"] for value in found["several"]}
        if len(norms) != 1:
            return f"the ranks' weights differ: {sorted(norms)}"
        return _differs("norm", found, _EXACT)

    def bf16() -> str | None:
        values = _train(ranks, device, "bf16")
        if "one" not in found:
            return _NOT_COMPARED
        ours, exact = values[0]["losses"], found["one"]["losses"]
        close = all(abs(a - b) <= _ROUGH * max(1.0, abs(b)) for a, b in zip(ours, exact, strict=True))
        return None if close and ours != exact else f"bf16 gives {ours}, float32 {exact}"

    return [
        ("1 rank trains", one),
        (f"{ranks} ranks train", several),
        ("the losses are those of 1 rank", same_losses),
        ("the weights are equal on all ranks, and those of 1 rank", same_weights),
        (f"{ranks} ranks train in bf16", bf16),
    ]


def _differs(what: str, found: dict[str, Any], tolerance: float) -> str | None:
    if "one" not in found or "several" not in found:
        return _NOT_COMPARED
    expected = found["one"][what]
    for value in found["several"]:
        pairs = (
            zip(value[what], expected, strict=True)
            if isinstance(expected, list)
            else [(value[what], expected)]
        )
        if any(abs(a - b) > tolerance for a, b in pairs):
            return f"rank {value['rank']} has {value[what]}, 1 rank had {expected}"
    return None


def _train(ranks: int, device: str | None, precision: str | None = None) -> list[dict[str, Any]]:
    request = make_request(
        _task,
        (precision,),
        None,
        num_processes=ranks,
        device=device,
        output="none",
        folder=False,
        name="test",
    )
    run = start_run(
        request.task,
        config=request.config,
        plan=request.plan,
        limits=request.limits,
        env={},
        sinks=[],
        folder=None,
        say=lambda _: None,
        label=lambda _: None,
    )
    return list(run.result())


def _task(precision: str | None) -> dict[str, object]:
    """In a rank, where torch may be imported."""
    import warnings

    from nbaccel.core.selfcheck import train

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16 on old hardware is slow, which is not the question here
        return train(precision)
