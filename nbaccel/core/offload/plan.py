"""Which part of a model lies where, and how long a forward pass takes then. Pure.

A part that lies where it runs takes `max(operations / speed, bytes read / memory bandwidth)`. One that lies
elsewhere is copied while the one before it runs, so it takes the copy's time if that is longer. A table of
embeddings is read where it lies: only its rows travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nbaccel.core.offload.machine import Machine
from nbaccel.core.offload.parts import Cost, Part, group_tied, human

__all__ = ["HOST", "Item", "Plan", "Row", "executing", "items_of", "pass_seconds", "plan_given"]

HOST = ("cpu", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entry of a device map."""

    module: str
    num_bytes: int
    seconds: float
    """Estimated, of one forward pass."""
    place: str
    why: str


@dataclass(slots=True, eq=False)
class Kind:
    """What items that take equally long everywhere have in common."""

    num_bytes: int
    buffer_bytes: int
    flops: float
    read: int
    """Bytes of its parameters that a forward pass reads."""
    lookup: bool


@dataclass(slots=True, eq=False)  # not frozen: made in thousands
class Item:
    """Parts that have to lie together, because they share parameters; mostly one."""

    parts: Sequence[int]
    name: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything lies."""

    parts: Sequence[Part]
    places: Sequence[str]
    """Of each part."""
    whys: Sequence[str]
    seconds: Sequence[float]
    main: str
    """The device on which runs what is streamed."""
    room: int
    """Bytes kept free there: for the part that runs and the next one."""

    @property
    def device_map(self) -> dict[str, str]:
        """By name of module or tensor, as `dispatch_model` takes it; as few entries as there can be. The first
        accelerator in it is the main one, if it holds anything."""
        if len(set(self.places)) == 1:
            return {"": self.places[0]}
        uniform = self._uniform()
        found: dict[str, str] = {}
        for part, place in zip(self.parts, self.places, strict=True):
            for key in part.keys if part.own else (part.name,):
                found[_highest(key, uniform)] = place
        if self.main in found.values() and executing(found.values())[0] != self.main:
            first = next(name for name, place in found.items() if place == self.main)
            found = {first: self.main, **found}
        return found

    @property
    def rows(self) -> list[Row]:
        """The device map with its reasons."""
        rows = []
        for name, shares in self._entries().items():
            said = list(dict.fromkeys(self.whys[index] for index in shares))
            rows.append(
                Row(
                    module=name,
                    num_bytes=round(sum(_held(self.parts[i].cost) * share for i, share in shares.items())),
                    seconds=sum(self.seconds[i] * share for i, share in shares.items()),
                    place=self.places[next(iter(shares))],
                    why=said[0] if len(said) == 1 else f"{said[0]}, …",
                )
            )
        return rows

    def table(self) -> str:
        """Module, bytes, estimated compute, place and why, for people."""
        lines = [("module", "bytes", "compute", "place", "why")]
        lines += [
            (r.module or "(all)", human(r.num_bytes), f"{r.seconds * 1e3:.2f} ms", r.place, r.why)
            for r in self.rows
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in lines
        )

    def _entries(self) -> dict[str, dict[int, float]]:
        """The parts of each entry, the highest module below which everything lies in one place; and how much of each
        part it has, because a module's own tensors are one part and several entries.
        """
        uniform = self._uniform()
        entries: dict[str, dict[int, float]] = {}
        for index, part in enumerate(self.parts):
            for key, share in part.shares.items():
                shares = entries.setdefault(_highest(key, uniform), {})
                shares[index] = shares.get(index, 0) + share
        return entries

    def _uniform(self) -> dict[str, str | None]:
        """The one place of all that is at or below a name; None where there are several."""
        uniform: dict[str, str | None] = {}
        for part, place in zip(self.parts, self.places, strict=True):
            for key in part.keys if part.own else (part.name,):
                _mark(key, place, uniform)
        return uniform


def _held(cost: Cost) -> int:
    return cost.num_bytes + cost.buffer_bytes


def executing(places: Iterable[str]) -> list[str]:
    """The devices that compute: the accelerators among `places`, else the CPU."""
    return list(dict.fromkeys(place for place in places if place not in HOST)) or ["cpu"]


def items_of(parts: Sequence[Part], tokens: int) -> list[Item]:
    """The parts, tied ones together at the first one's turn."""
    kinds: dict[int, Kind] = {}
    items = []
    for group in group_tied(parts):
        first = parts[group[0]]
        kind = kinds.get(id(first.cost))
        if kind is None:
            kind = kinds[id(first.cost)] = _kind([first.cost], tokens)
        if len(group) > 1:
            kind = _kind([parts[index].cost for index in group], tokens)
        items.append(Item(group, first.name or ", ".join(first.keys[:3]) or "the model", kind))
    return items


def _kind(costs: Sequence[Cost], tokens: int) -> Kind:
    num_bytes, lookup = sum(cost.num_bytes for cost in costs), all(cost.rows for cost in costs)
    looked_up = tokens * sum(cost.read_per_token for cost in costs)
    # A table that is tied to something else is read as a whole, for that other use.
    read = costs[0].read_always + looked_up if lookup or len(costs) == 1 else num_bytes
    return Kind(
        num_bytes,
        sum(cost.buffer_bytes for cost in costs),
        sum(cost.flops for cost in costs),
        min(num_bytes, read),
        lookup,
    )


def pass_seconds(item: Item, place: str, device: str, machine: Machine, tokens: int) -> float:
    """Of one forward pass with `item` at `place`, computed on `device` unless it is a table on the host."""
    kind = item.kind
    if kind.lookup and place in HOST:
        device = "cpu"
    speed = machine.devices[device]
    run = max(kind.flops * tokens / speed.flops, kind.read / speed.memory)
    if place == device:
        return run
    bandwidth = machine.disk if place == "disk" else math.inf
    if device == "cpu":  # mapped: what is not read does not travel
        return max(run, kind.read / bandwidth)
    return max(run, kind.num_bytes / min(bandwidth, speed.transfer))


def spread(
    parts: Sequence[Part],
    items: Sequence[Item],
    places: Sequence[str],
    whys: Sequence[str],
    machine: Machine,
    tokens: int,
    main: str,
    room: int,
) -> Plan:
    """The plan that puts each item with all its parts into its place."""
    known: dict[tuple[Kind, str], float] = {}
    chosen, reasons, seconds = [""] * len(parts), [""] * len(parts), [0.0] * len(parts)
    for item, place, why in zip(items, places, whys, strict=True):
        took = known.get((item.kind, place))
        if took is None:
            device = main if place in HOST else place
            took = known[item.kind, place] = pass_seconds(item, place, device, machine, tokens)
        first = item.parts[0]
        chosen[first], reasons[first], seconds[first] = place, why, took
        for index in item.parts[1:] if len(item.parts) > 1 else ():
            chosen[index], reasons[index] = place, f"tied to {item.name}"
    return Plan(parts=parts, places=chosen, whys=reasons, seconds=seconds, main=main, room=room)


def plan_given(
    parts: Sequence[Part], places: Sequence[str], machine: Machine, *, main: str, tokens: int = 1
) -> Plan:
    """The plan of a map that the user wrote. Tied parts lie together: in the fastest place given to one."""
    items = items_of(parts, tokens)
    devices = executing(places)
    order = [*devices, *(place for place in HOST if place not in devices)]
    chosen = [min((places[i] for i in item.parts), key=order.index) for item in items]
    streamed = [
        item.kind.num_bytes
        for item, place in zip(items, chosen, strict=True)
        if main != "cpu" and place in HOST and not item.kind.lookup
    ]
    room = 2 * max(streamed, default=0)
    return spread(parts, items, chosen, ["as given"] * len(items), machine, tokens, main, room)


def _mark(name: str, place: str, uniform: dict[str, str | None]) -> None:
    """Notes that something at or below `name` lies in `place`, for every name above it."""
    while uniform.get(name, "") != place:
        uniform[name] = place if name not in uniform else None
        if not name:
            return
        name = name.rpartition(".")[0]


def _highest(name: str, uniform: Mapping[str, str | None]) -> str:
    """The highest name at or above this one below which everything lies in one place."""
    if not name or uniform[name.rpartition(".")[0]] is None:
        return name  # what is above several places is above several places all the way up
    if uniform[""] is not None:
        return ""
    dot = name.find(".")
    while dot >= 0:
        if uniform[name[:dot]] is not None:
            return name[:dot]
        dot = name.find(".", dot + 1)
    return name
