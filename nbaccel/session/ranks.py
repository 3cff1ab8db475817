"""The ranks of a group in the hands of whoever drives them: what they are told and what is done to them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, final

from nbaccel.engines.base import Control, Engine, Retry
from nbaccel.rank.spec import Call, RunSpec
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.wires import Wires
from nbaccel.wire.channel import Channel, ChannelClosed

__all__ = ["Ranks"]


@final
class Ranks:
    """Asks an engine for a group's ranks, talks to them, replaces and ends them; it decides nothing. Belongs to the
    relay's thread.

    Args:
        engine: makes and ends them.
        spec: the group.
        delivery: what they are given at their start.
        on_control, on_rank, on_output: as `Wires`.

    Attributes:
        wires: what is read from them.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        delivery: Delivery,
        *,
        on_control: Callable[[], None],
        on_rank: Callable[[int], None],
        on_output: Callable[[int, Literal["stdout", "stderr"], bytes], None],
    ) -> None:
        self._engine, self._spec, self._delivery = engine, spec, delivery
        self.wires = Wires(
            engine.start(spec, delivery.parcel, delivery.fd),
            on_control=on_control,
            on_rank=on_rank,
            on_output=on_output,
        )

    @property
    def notes(self) -> Sequence[str]:
        """What the person should know about how they came to be."""
        return self.wires.ports.notes

    def make_again(self, retries: Sequence[Retry]) -> None:
        """Ask for all of them once more, in the way the retries say."""
        sent = self._delivery
        self.wires.replace(self._engine.start(self._spec, sent.parcel, sent.fd, after=tuple(retries)))

    def replace(self, rank: int, generation: int) -> None:
        """Ask for one of them again, to join the process group of this generation."""
        self.wires.drop_rank(rank)
        self._engine.respawn(self.wires.ports, rank, generation)
        self.wires.watch_rank(rank)

    # ── what they are told ────────────────────────────────────────────────────────────────────────

    def send(self, rank: int, message: Any) -> None:
        """Tell one of them; nothing happens if it has ended."""
        self._send_encoded(rank, Channel.encode(message), ())

    def send_all(self, message: Any) -> None:
        """Tell every one of them."""
        frame = Channel.encode(message)
        for rank in range(self._spec.num_processes):
            self._send_encoded(rank, frame, ())

    def begin(self, call: CallInFlight) -> None:
        """Let the call's ranks run it. It is pickled once, or twice if only some of the values are wanted."""
        delivered = call.delivery is self._delivery
        parcel, fd = (None, None) if delivered else (call.delivery.parcel, call.delivery.fd)
        fds = () if fd is None else (fd,)
        frames: dict[bool, bytes] = {}
        for rank in call.ranks:
            wanted = call.wants_value(rank)
            if wanted not in frames:
                frames[wanted] = Channel.encode(Call(call.id, wanted, parcel), len(fds))
            self._send_encoded(rank, frames[wanted], fds)

    def _send_encoded(self, rank: int, frame: bytes, fds: Sequence[int]) -> None:
        try:
            self.wires.ports.channels[rank].send_encoded(frame, fds)
        except ChannelClosed:
            pass  # it died just now: its exit says so

    # ── what is done to them ──────────────────────────────────────────────────────────────────────

    def kill(self, ranks: Collection[int], number: signal.Signals) -> None:
        """Send a signal to these; SIGKILL ends what they started as well."""
        self._engine.kill(self.wires.ports, ranks, number)

    def stop(self) -> None:
        """Let their parent end whatever is left."""
        self._engine.stop(self.wires.ports)

    # ── their parent ──────────────────────────────────────────────────────────────────────────────

    def news(self) -> list[Control]:
        """What whoever makes them has said; never blocks."""
        return self._engine.exits(self.wires.ports)

    @property
    def parent_gone(self) -> bool:
        """Whether whoever makes them has ended, and they with it."""
        return self.wires.ports.control.eof

    def server_lost(self) -> bool:
        """Whether who was asked for them has ended: then it is no fault of theirs that they did not come up."""
        return self._engine.lost()

    def log(self) -> str:
        """The last words of the processes that make them, for an error's message."""
        return self._engine.log()
