"""The choice of places: evenly, in order, or by what saves most time per byte of the fast memory. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from nbaccel.core.offload.machine import Machine
from nbaccel.core.offload.parts import Part, human, listed
from nbaccel.core.offload.plan import HOST, Item, Kind, Plan, executing, items_of, pass_seconds, spread
from nbaccel.errors import ConfigError

__all__ = ["Mode", "plan_placement"]

Mode = Literal["auto", "balanced", "sequential"]
_HALVINGS = 24  # of the interval in which the smallest largest share is sought
_MUCH_LESS = 0.95  # of the time: for less no device is left out
_SIZES = 4  # how many of the largest sizes are tried as the largest one that is streamed


def plan_placement(
    parts: Sequence[Part],
    limits: Mapping[str, int],
    machine: Machine,
    *,
    mode: Mode = "auto",
    tokens: int = 1,
    kv_cache: int = 0,
    main: str | None = None,
) -> Plan:
    """Places parts within `limits`, bytes by place in order of preference; "disk" has none unless it is given.

    Args:
        mode: "auto" and "balanced" divide a model that fits on the accelerators evenly, in model order, and
            otherwise give the fast memory to what gains most; "sequential" fills one place after the other. "auto"
            leaves out accelerators without which a pass is shorter.
        tokens: per forward pass, of the whole batch: many make compute hide the copies.
        kv_cache: bytes kept free on the computing devices, shared in proportion to their limits.
        main: where what is streamed runs: the CPU, or the first of the accelerators; None: that is free.

    Raises:
        ConfigError: something fits nowhere; the message says what and by how much.
    """
    items = items_of(parts, tokens)
    devices = executing(limits)
    given = {place: limits.get(place, 0) for place in (*devices, "cpu")}
    given["disk"] = limits.get("disk", 1 << 62)

    def on(used: Sequence[str]) -> _Placing:
        free = dict(given)
        total = sum(given[device] for device in used)
        for device in used:
            free[device] -= kv_cache * given[device] // total if total else kv_cache
        return _Placing(items, used, given, free, machine, tokens)

    orders = _orders(devices, given, machine) if mode == "auto" else [devices]
    if main in devices:
        orders = [order for order in orders if order[0] == main]
    if mode == "sequential":
        placing = on(devices)
        placing.in_order()
    elif even := [placing for placing in map(on, orders) if placing.evenly()]:
        placing = _fastest(even)
    else:
        placing = _by_gain([[on(order) for _ in range(_SIZES)] for order in orders], items)
    return spread(
        parts, items, placing.places, placing.whys, machine, tokens, main or placing.main, placing.room
    )


def _orders(devices: Sequence[str], limits: Mapping[str, int], machine: Machine) -> list[Sequence[str]]:
    """Which devices may compute, that first on which runs what is streamed: all of them; and all but the small ones, or
    but the slow ones, which may cost more than their memory saves."""
    size = {device: _step(limits[device]) for device in devices}
    speed = {device: _step(machine.devices[device].flops) for device in devices}
    orders = [tuple(devices), tuple(sorted(devices, key=lambda device: -size[device]))]
    for known in (size, speed):
        for least in sorted(set(known.values()))[1:]:
            orders.append(tuple(device for device in devices if known[device] >= least))
    return list(dict.fromkeys(orders))


def _step(value: float) -> int:
    """The same for what differs by less than a third or so."""
    return round(2 * math.log2(max(1.0, value)))


def _fastest(placed: Sequence[_Placing]) -> _Placing:
    """The first of those between which there is little."""
    best = placed[0]
    for placing in placed[1:]:
        if placing.total_seconds() < _MUCH_LESS * best.total_seconds():
            best = placing
    return best


def _by_gain(tries: Sequence[Sequence[_Placing]], items: Sequence[Item]) -> _Placing:
    """The fastest of the best of each order of devices."""
    found: list[_Placing] = []
    problem: ConfigError | None = None
    for tried in tries:
        try:
            found.append(_best(tried, items, streams=tried[0].main != "cpu"))
        except ConfigError as error:
            problem = problem or error
    if not found and problem is not None:
        raise problem
    return _fastest(found)


def _best(tries: Sequence[_Placing], items: Sequence[Item], *, streams: bool) -> _Placing:
    """The fastest placement among those that stream nothing larger than one of the largest sizes.

    A large part that stays in the fast memory for good needs no second place of its size beside it.
    """
    sizes = (
        sorted({item.kind.num_bytes for item in items if not item.kind.lookup}, reverse=True)
        if streams
        else []
    )
    best: _Placing | None = None
    problem: ConfigError | None = None
    for placing, largest in zip(tries, sizes or [0], strict=False):
        try:
            placing.by_gain(largest)
        except ConfigError as error:
            problem = problem or error
        else:
            best = placing if best is None or placing.total_seconds() < best.total_seconds() else best
    if best is None:
        raise problem or ConfigError("the model has nothing to place")
    return best


class _Placing:
    """One placement under way."""

    def __init__(
        self,
        items: Sequence[Item],
        devices: Sequence[str],
        limits: Mapping[str, int],
        free: dict[str, int],
        machine: Machine,
        tokens: int,
    ) -> None:
        self._items, self._devices, self._limits, self._free = items, devices, limits, free
        self._machine, self._tokens = machine, tokens
        self._buffers_kept = False
        self._seconds_known: dict[tuple[Kind, str], float] = {}
        self._bytes = [item.kind.num_bytes for item in items]
        self._bytes_with_buffers = [item.kind.num_bytes + item.kind.buffer_bytes for item in items]
        self.places = [""] * len(items)
        self.whys = [""] * len(items)
        self.room = 0

    @property
    def main(self) -> str:
        """The device on which runs what is streamed."""
        return self._devices[0]

    def evenly(self) -> bool:
        """Everything on the computing devices, contiguous, the largest share as small as can be; else False."""
        free = [self._free[device] for device in self._devices]
        ends = list(accumulate(self._bytes_with_buffers))
        cuts = _cuts(ends, free)
        if cuts is None:
            return False
        low, high = 0.0, float(ends[-1] if ends else 0)
        for _ in range(_HALVINGS if len(free) > 1 else 0):
            middle = (low + high) / 2
            tried = _cuts(ends, [min(room, int(middle)) for room in free])
            if tried is None:
                low = middle
            else:
                cuts, high = tried, middle
        start = 0
        for device, end in zip(self._devices, cuts, strict=True):
            self.places[start:end] = [device] * (end - start)
            self.whys[start:end] = ["fits" if len(free) == 1 else "an even share"] * (end - start)
            start = end
        return True

    def in_order(self) -> None:
        """One place after the other, never back to an earlier one."""
        order = [*self._devices, *(place for place in HOST if place not in self._devices)]
        sizes = [0 if item.kind.lookup else item.kind.num_bytes for item in self._items]
        # What has to be free beside item i when all after it are streamed.
        after = [*[*accumulate(reversed(sizes), max)][-2::-1], 0]
        needed = sum(item.kind.num_bytes + item.kind.buffer_bytes for item in self._items)
        overflows = needed > sum(self._free[device] for device in self._devices)
        streams = self.main != "cpu" and overflows
        if overflows:
            self._keep_buffers()
        turn = 0
        for index, item in enumerate(self._items):
            while turn < len(order):
                room = 2 * after[index] if streams and turn == 0 else 0
                if self._needs(order[turn])[index] + room <= self._free[order[turn]]:
                    break
                if turn == 0 and streams:
                    self._keep_room(item if item.kind.num_bytes >= after[index] else self._largest(index))
                turn += 1
            if turn == len(order):
                raise self._too_small(range(index, len(self._items)))
            self._free[order[turn]] -= self._needs(order[turn])[index]
            self.places[index], self.whys[index] = order[turn], "its turn"

    def by_gain(self, largest: int) -> None:
        """What saves most time per byte goes first into the fast memory, then the rest is parted likewise.

        With accelerators nothing larger than `largest` bytes is streamed: what is, has to stay there.
        """
        left: Sequence[int] = range(len(self._items))
        self._keep_buffers()
        if self.main != "cpu":
            streamed = [
                i for i, item in enumerate(self._items) if item.kind.lookup or item.kind.num_bytes <= largest
            ]
            left = streamed
            kept = [
                i
                for i, item in enumerate(self._items)
                if not item.kind.lookup and item.kind.num_bytes > largest
            ]
            if without := self._choose(kept, self._devices, "disk"):
                raise self._too_small(without)
            moved = [self._items[i] for i in streamed if not self._items[i].kind.lookup]
            if moved:
                self._keep_room(max(moved, key=lambda item: item.kind.num_bytes))
        host = [place for place in HOST if place not in self._devices]
        left = self._choose(left, self._devices, host[0])
        if len(host) > 1:
            left = self._choose(left, ["cpu"], "disk")
        if sum(self._items[index].kind.num_bytes for index in left) > self._free["disk"]:
            raise self._too_small(left)
        said: dict[Kind, str] = {}
        for index in left:
            item = self._items[index]
            why = said.get(item.kind)
            if why is None:
                why = said[item.kind] = self._why_on_disk(item)
            self.places[index], self.whys[index] = "disk", why

    def total_seconds(self) -> float:
        """Of one forward pass."""
        return sum(self._seconds(item, place) for item, place in zip(self._items, self.places, strict=True))

    def _largest(self, start: int) -> Item:
        items = [item for item in self._items[start:] if not item.kind.lookup]
        return max(items, key=lambda item: item.kind.num_bytes)

    def _seconds(self, item: Item, place: str) -> float:
        key = (item.kind, place)
        found = self._seconds_known.get(key)
        if found is None:
            device = self._devices[0] if place in HOST else place
            found = pass_seconds(item, place, device, self._machine, self._tokens)
            self._seconds_known[key] = found
        return found

    def _choose(self, candidates: Iterable[int], places: Sequence[str], otherwise: str) -> list[int]:
        """Puts into `places` what gains most there, and returns what found no room, in model order."""
        ranked: dict[int, list[int]] = {}
        known: dict[Kind, tuple[list[int], str]] = {}
        for index in candidates:
            kind = self._items[index].kind
            found = known.get(kind)
            if found is None:
                step, why = self._worth(self._items[index], places[0], otherwise)
                found = known[kind] = ranked.setdefault(step, []), why
            found[0].append(index)
        left: list[int] = []
        needs = {place: self._needs(place) for place in places}
        for _, indices in sorted(ranked.items()):
            for index in indices:
                for place, needed in needs.items():
                    if needed[index] <= self._free[place]:
                        self._free[place] -= needed[index]
                        self.places[index], self.whys[index] = place, known[self._items[index].kind][1]
                        break
                else:
                    left.append(index)
        return sorted(left)

    def _worth(self, item: Item, place: str, otherwise: str) -> tuple[int, str]:
        """Its turn, early where a byte of `place` saves much, and why it is there.

        In steps of 5 %: what gains about the same keeps the order of the model.
        """
        gain = self._seconds(item, otherwise) - self._seconds(item, place)
        density = gain / max(1, item.kind.num_bytes)
        step = -round(20 * math.log(density)) if density > 0 else 1 << 30
        return step, f"saves {gain * 1e3:.2f} ms per pass" if gain > 5e-6 else "fits"

    def _keep_buffers(self) -> None:
        """All buffers are on the first device that computes, whatever is streamed to it."""
        self._buffers_kept = True
        self._free[self._devices[0]] -= sum(item.kind.buffer_bytes for item in self._items)

    def _keep_room(self, largest: Item) -> None:
        """Space on the first accelerator for the largest part in flight and, where possible, the one after."""
        main = self._devices[0]
        free = max(0, self._free[main])
        short = largest.kind.num_bytes - free
        if short > 0:
            raise ConfigError(
                f"{largest.name} takes {human(largest.kind.num_bytes)} and has to be on {main} while it runs, which "
                f"has {human(free)} of its {human(self._limits[main])} for it: {human(short)} short. "
                f"Raise max_memory[{main!r}], or let its class be divided"
            )
        self.room = min(2 * largest.kind.num_bytes, free)
        self._free[main] -= self.room

    def _needs(self, place: str) -> list[int]:
        """Bytes that each item takes at `place`. Buffers are where their part runs, never on the disk."""
        apart = self._buffers_kept or place not in self._devices
        return self._bytes if apart else self._bytes_with_buffers

    def _why_on_disk(self, item: Item) -> str:
        if item.kind.lookup or (self.main == "cpu" and 2 * item.kind.read < item.kind.num_bytes):
            return "rows are read where they lie"
        where = [place for place in dict.fromkeys((*self._devices, "cpu")) if self._limits[place]]
        left = ", ".join(f"{place} has {human(max(0, self._free[place]))} left" for place in where)
        return f"needs {human(item.kind.num_bytes)}; {left}" if left else "the only place"

    def _too_small(self, indices: Iterable[int]) -> ConfigError:
        without = [self._items[index] for index in indices]
        needed = sum(item.kind.num_bytes for item in without)
        free = {place: max(0, room) for place, room in self._free.items()}
        last = "disk" if "disk" in free and self._limits["disk"] < 1 << 62 else self._devices[0]
        left = ", ".join(
            f"{place} {human(room)} of {human(self._limits[place])}"
            for place, room in free.items()
            if self._limits[place] < 1 << 62
        )
        return ConfigError(
            f"{listed([item.name for item in without])}: {human(needed)} fit nowhere, "
            f"{human(needed - free[last])} more than {last} has left (left: {left}). Raise max_memory"
        )


def _cuts(ends: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """Where each room's share of the sequence ends when each takes what it can; None if some is left over."""
    cuts, done, taken = [], 0, 0
    for room in rooms:
        taken = max(taken, bisect_right(ends, done + room))
        done = ends[taken - 1] if taken else 0
        cuts.append(taken)
    return cuts if taken == len(ends) else None
