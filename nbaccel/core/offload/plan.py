"""Which part of a model lies where, and how long a forward pass takes then. Pure.

A part that lies where it runs takes `max(operations / speed, bytes read / memory bandwidth)`. One that lies
elsewhere is copied while the one before it runs, so it takes the copy's time if that is longer. A table of
embeddings is read where it lies: only its rows travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbaccel.core.offload.machine import Machine
from nbaccel.core.offload.parts import Part, group_tied, human

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


@dataclass(slots=True, eq=False)  # not frozen: made in thousands
class Item:
    """Parts that have to lie together, because they share parameters; mostly one."""

    parts: list[int]
    num_bytes: int
    buffer_bytes: int
    flops: int
    read: int
    """Bytes of its parameters that a forward pass reads."""
    lookup: bool
    name: str
    kind: tuple[int, int, int, bool] = field(init=False)
    """Items of one kind cost the same everywhere."""

    def __post_init__(self) -> None:
        self.kind = (self.num_bytes, self.flops, self.read, self.lookup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything lies."""

    parts: Sequence[Part]
    places: Sequence[str]
    """Of each part."""
    whys: Sequence[str]
    seconds: Sequence[float]
    room: int
    """Bytes kept free where streamed parts run: for the one that runs and the next one."""

    @property
    def device_map(self) -> dict[str, str]:
        """By name of module or tensor, as `dispatch_model` takes it; as few entries as there can be."""
        return {name: self.places[indices[0]] for name, indices in self._entries().items()}

    @property
    def rows(self) -> list[Row]:
        """The device map with its reasons."""
        rows = []
        for name, indices in self._entries().items():
            said = list(dict.fromkeys(self.whys[index] for index in indices))
            rows.append(
                Row(
                    module=name,
                    num_bytes=sum(self.parts[i].num_bytes + self.parts[i].buffer_bytes for i in indices),
                    seconds=sum(self.seconds[i] for i in indices),
                    place=self.places[indices[0]],
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

    def _entries(self) -> dict[str, list[int]]:
        """The parts of each entry: the highest module below which everything lies in one place."""
        uniform: dict[str, str | None] = {}
        for part, place in zip(self.parts, self.places, strict=True):
            for key in part.keys:
                _mark(key, place, uniform)
        entries: dict[str, list[int]] = {}
        for index, part in enumerate(self.parts):
            for key in part.keys:
                indices = entries.setdefault(_highest(key, uniform), [])
                if not indices or indices[-1] != index:
                    indices.append(index)
        return entries


def executing(places: Iterable[str]) -> list[str]:
    """The devices that compute: the accelerators among `places`, else the CPU."""
    return list(dict.fromkeys(place for place in places if place not in HOST)) or ["cpu"]


def items_of(parts: Sequence[Part], tokens: int) -> list[Item]:
    """The parts, tied ones together at the first one's turn."""
    items = []
    for group in group_tied(parts):
        first = parts[group[0]]
        item = Item(
            group,
            first.num_bytes,
            first.buffer_bytes,
            first.flops,
            min(first.num_bytes, first.read_always + tokens * first.read_per_token),
            bool(first.rows),
            first.name or ", ".join(first.keys[:3]) or "the model",
        )
        items.append(item if len(group) == 1 else _together(item, [parts[index] for index in group], tokens))
    return items


def _together(first: Item, members: Sequence[Part], tokens: int) -> Item:
    num_bytes, lookup = sum(p.num_bytes for p in members), all(p.rows for p in members)
    return Item(
        first.parts,
        num_bytes,
        sum(p.buffer_bytes for p in members),
        sum(p.flops for p in members),
        min(num_bytes, tokens * sum(p.read_per_token for p in members)) if lookup else num_bytes,
        lookup,
        first.name,
    )


def pass_seconds(item: Item, place: str, device: str, machine: Machine, tokens: int) -> float:
    """Of one forward pass with `item` at `place`, computed on `device` unless it is a table on the host."""
    if item.lookup and place in HOST:
        device = "cpu"
    speed = machine.devices[device]
    run = max(item.flops * tokens / speed.flops, item.read / speed.memory)
    if place == device:
        return run
    bandwidth = machine.disk if place == "disk" else math.inf
    if device == "cpu":  # mapped: what is not read does not travel
        return max(run, item.read / bandwidth)
    return max(run, item.num_bytes / min(bandwidth, speed.transfer))


def spread(
    parts: Sequence[Part],
    items: Sequence[Item],
    places: Sequence[str],
    whys: Sequence[str],
    machine: Machine,
    tokens: int,
    room: int,
) -> Plan:
    """The plan that puts each item with all its parts into its place."""
    main = executing(places)[0]
    known: dict[tuple[object, str], float] = {}
    chosen, reasons, seconds = [""] * len(parts), [""] * len(parts), [0.0] * len(parts)
    for item, place, why in zip(items, places, whys, strict=True):
        took = known.get((item.kind, place))
        if took is None:
            device = main if place in HOST else place
            took = known[item.kind, place] = pass_seconds(item, place, device, machine, tokens)
        first = item.parts[0]
        for index in item.parts:
            chosen[index] = place
            reasons[index] = why if index == first else f"tied to {item.name}"
        seconds[first] = took
    return Plan(parts=parts, places=chosen, whys=reasons, seconds=seconds, room=room)


def plan_given(parts: Sequence[Part], places: Sequence[str], machine: Machine, *, tokens: int = 1) -> Plan:
    """The plan of a map that the user wrote. Tied parts lie together: in the fastest place given to one."""
    items = items_of(parts, tokens)
    devices = executing(places)
    order = [*devices, *(place for place in HOST if place not in devices)]
    chosen = [min((places[i] for i in item.parts), key=order.index) for item in items]
    streamed = [
        item.num_bytes
        for item, place in zip(items, chosen, strict=True)
        if devices != ["cpu"] and place in HOST and not item.lookup
    ]
    room = 2 * max(streamed, default=0)
    return spread(parts, items, chosen, ["as given"] * len(items), machine, tokens, room)


def _mark(name: str, place: str, uniform: dict[str, str | None]) -> None:
    """Notes that something at or below `name` lies in `place`, for every name above it."""
    while uniform.get(name, "") != place:
        uniform[name] = place if name not in uniform else None
        if not name:
            return
        name = name.rpartition(".")[0]


def _highest(name: str, uniform: Mapping[str, str | None]) -> str:
    """The highest name at or above this one below which everything lies in one place."""
    if uniform[""] is not None:
        return ""
    dot = name.find(".")
    while dot >= 0:
        if uniform[name[:dot]] is not None:
            return name[:dot]
        dot = name.find(".", dot + 1)
    return name
