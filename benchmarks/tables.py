"""From samples to the tables of the README: medians, and ratios beside the targets."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

from peers import ACCELERATE, ACCELERATE_DYNAMO, NBACCEL, PEERS

__all__ = ["Sample", "report"]

MB = 1_000_000
TIMES = {
    "function": "first line after its imports",
    "group": "process group",
    "step": "first DDP step",
    "cell": "whole trivial cell",
}
TITLES = {
    "light": "Warm: a later cell; the kernel has imported torch and the launcher",
    "heavy": "Warm, heavy imports: `transformers.Trainer`, scikit-learn and matplotlib in kernel and function",
    "cold": "Cold: the first cell of a fresh kernel, with its imports",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured value: seconds, bytes, or what the name of `what` says."""

    scenario: str
    peer: str
    n: int
    what: str
    value: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Medians:
    """Medians by (scenario, peer, n, what); a missing one is None."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        groups: dict[tuple[str, str, int, str], list[float]] = {}
        for s in samples:
            groups.setdefault((s.scenario, s.peer, s.n, s.what), []).append(s.value)
        self._values = {key: median(values) for key, values in groups.items()}
        self.counts = {key: len(values) for key, values in groups.items()}

    def get(self, scenario: str, peer: str, n: int, what: str) -> float | None:
        return self._values.get((scenario, peer, n, what))

    def sizes(self, scenario: str) -> list[int]:
        return sorted({key[2] for key in self._values if key[0] == scenario})

    def has(self, scenario: str) -> bool:
        return any(key[0] == scenario for key in self._values)


def report(samples: Sequence[Sample]) -> str:
    """Markdown: what was measured on, a table for each scenario, the targets."""
    medians = _Medians(samples)
    parts = [_machine()]
    parts += [_times(medians, scenario) for scenario in TITLES if medians.has(scenario)]
    parts += [_arguments(medians), _relay(medians), _targets(medians)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine() -> str:
    peers = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "lightning-fabric"))
    return (
        f"Medians on {os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, "
        f"ipykernel {version('ipykernel')}, {peers}; each launcher in its own real kernel, in turn."
    )


def _times(medians: _Medians, scenario: str) -> str:
    sizes = medians.sizes(scenario)
    columns = [what for what in TIMES if medians.get(scenario, NBACCEL.name, sizes[0], what) is not None]
    if not columns:
        return ""  # it was left out
    rows = [
        [
            peer.name,
            *("  /  ".join(_seconds(medians.get(scenario, peer.name, n, c)) for n in sizes) for c in columns),
        ]
        for peer in PEERS
        if medians.get(scenario, peer.name, sizes[0], columns[0]) is not None
    ]
    unit = f"Seconds from the cell, n = {' / '.join(map(str, sizes))}"
    text = f"**{TITLES[scenario]}**\n\n" + _table([unit, *(TIMES[c] for c in columns)], rows)
    for peer in PEERS:
        if failed := sum(medians.counts.get((scenario, peer.name, n, "failed"), 0) for n in sizes):
            text += f"\n\n{peer.name}: {failed} launches hung or failed and are not counted."
    return text


def _arguments(medians: _Medians) -> str:
    rows = []
    for kind in ("256 MB tensor", "Python objects"):
        for peer in (NBACCEL, ACCELERATE):
            values = [
                medians.get(kind, peer.name, 4, what)
                for what in ("seconds without", "seconds", "pss without", "pss", "copy")
            ]
            if None in values:
                continue
            without, seconds, pss_without, pss, copy = (value or 0.0 for value in values)
            one_copy = f"{copy:.2f}" if kind.endswith("tensor") else ""
            memory = [f"{pss_without / MB:,.0f}", f"{pss / MB:,.0f}"]
            rows.append([kind, peer.name, f"{without:.2f}", f"{seconds:.2f}", one_copy, *memory])
    if not rows:
        return ""
    head = ["Argument", "launcher", "s without", "s, all 4 ranks have read it", "s for one copy"]
    head += ["PSS without, MB", "PSS with, MB"]
    return "**A large argument, 4 ranks** (PSS: kernel and everything it started)\n\n" + _table(head, rows)


def _relay(medians: _Medians) -> str:
    rows = []
    for peer in (NBACCEL, ACCELERATE):
        for n in medians.sizes("relay"):
            rate, whole = (medians.get("relay", peer.name, n, what) for what in ("lines per second", "whole"))
            if rate is not None and whole is not None:
                per_rank = rate * 100 / n / MB
                rows.append([peer.name, str(n), f"{rate:,.0f}", f"{per_rank:.1f}", f"{whole:.1%}"])
    if not rows:
        return ""
    head = ["Printing", "ranks", "lines/s, all ranks", "MB/s per rank", "lines whole at the end of the cell"]
    return "**Lines of 100 characters**\n\n" + _table(head, rows)


def _targets(medians: _Medians) -> str:
    def ratio(scenario: str, what: str, peer: str, other: str | None = None) -> float | None:
        ours = medians.get(scenario, NBACCEL.name, 4, what)
        theirs = medians.get(other or scenario, peer, 4, what)
        return ours / theirs if ours is not None and theirs else None

    bare = ACCELERATE.name
    wanted = [
        ("heavy imports: first line", ratio("heavy", "function", bare), 1.2, "accelerate's fork"),
        ("light: first line", ratio("light", "function", bare), 1.0, "accelerate's fork"),
        ("first DDP step", ratio("light", "step", bare), 0.25, "accelerate"),
        ("first DDP step", ratio("light", "step", ACCELERATE_DYNAMO.name), 1.2, ACCELERATE_DYNAMO.name),
        ("whole trivial cell", ratio("light", "cell", bare), 0.5, "accelerate"),
        ("Python objects: time", ratio("Python objects", "seconds", bare), 1.3, "accelerate's fork"),
        ("Python objects: PSS", ratio("Python objects", "pss", bare), 1.3, "accelerate's fork"),
    ]
    rows = [
        [what, f"{value:.2f}× {beside}", f"≤ {limit}×", "yes" if value <= limit else "**no**"]
        for what, value, limit, beside in wanted
        if value is not None
    ]
    rows += _absolute_targets(medians)
    return "**Targets, 4 ranks**\n\n" + _table(["", "measured", "target", "met"], rows) if rows else ""


def _absolute_targets(medians: _Medians) -> list[list[str]]:
    rows = []
    kind = "256 MB tensor"
    names = ("seconds", "seconds without", "copy", "pss", "pss without")
    values = [medians.get(kind, NBACCEL.name, 4, what) for what in names]
    if None not in values:
        seconds, without, copy, pss, pss_without = (value or 0.0 for value in values)
        # What reading costs a fork, which sends nothing, is not the launch's doing.
        fork = [medians.get(kind, ACCELERATE.name, 4, what) or 0.0 for what in names]
        extra = (seconds - without) - (fork[0] - fork[1]) - copy
        rows.append([f"{kind}: beyond one copy", f"{extra * 1000:+.0f} ms", "≤ 30 ms", _met(extra <= 0.030)])
        more = (pss - pss_without) / (64_000_000 * 4) - 1
        rows.append([f"{kind}: PSS beyond one copy", f"{more:+.1%} of it", "≤ 5 %", _met(more <= 0.05)])
    for n in medians.sizes("relay"):
        rate, whole = (
            medians.get("relay", NBACCEL.name, n, what) or 0.0 for what in ("lines per second", "whole")
        )
        per_rank = rate * 100 / n / MB
        shown = f"{per_rank:.1f} MB/s per rank, {1 - whole:.1%} lost"
        rows.append([f"relay, {n} ranks", shown, "≥ 10 MB/s, 0 %", _met(per_rank >= 10 and whole == 1)])
    return rows


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
