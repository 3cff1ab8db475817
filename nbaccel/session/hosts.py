"""Several hosts in one run: they meet through torch.distributed.elastic, watch one another, and meet again.

Every host runs `nbaccel launch` with the same endpoint; the one whose address it is serves the store. At
each meeting (a "round" of torch's rendezvous) the hosts learn their numbers and their ranks. While a run
is under way a thread beats into the store and looks at the others: a host that is silent, a rank that
failed or a host that waits to join ends the run here, and the hosts meet again.

Torch's store, its rendezvous and the ranks' traffic are plaintext: use a private network.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, final

from nbaccel.errors import ConfigError, LaunchError
from nbaccel.rank.spec import HostPlace

__all__ = ["Hosts", "Meeting", "Trouble"]

_BEAT = 1.0
_LOOK = 0.5
# torch compares the hosts' clocks for this: they must agree to within these seconds
_KEEP_ALIVE = 1
_KEEP_ALIVE_MISSED = 6
# seconds for an answer of the store
_PATIENCE = 60.0

Trouble = Literal["lost", "failed", "joining", "stopped"]
"""Why a run under way must end here although nothing is wrong with it here."""
_STOPS = {128 + signal.SIGINT: "Ctrl-C", 128 + signal.SIGTERM: "SIGTERM", 128 + signal.SIGHUP: "SIGHUP"}
"""What stopped a host, by the exit code of its command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and how the hosts meet.

    Raises:
        ConfigError: a number that cannot be, or an endpoint that is none.
    """

    endpoint: str
    """host:port, the same on every host."""
    min_hosts: int
    max_hosts: int
    run_id: str = "nbaccel"
    """Keeps two runs at one endpoint apart."""
    interface: str | None = None
    """Network interface of the ranks; None is the one that leads to the endpoint."""
    join_timeout: float = 600.0
    """Seconds to wait until `min_hosts` are there."""
    last_call: float = 10.0
    """Seconds to wait for more once they are."""
    silence: float = 5.0
    """Seconds after which a silent host is taken for lost."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts:
            raise ConfigError(f"--nnodes is {self.min_hosts}:{self.max_hosts}: write N or MIN:MAX, from 1")
        host, colon, port = self.endpoint.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--rdzv-endpoint is {self.endpoint!r}: write host:port, as in 10.0.0.1:29400")
        if ":" in host:
            raise ConfigError(
                f"--rdzv-endpoint is {self.endpoint!r}: hosts meet over IPv4; write an IPv4 address, or a name that "
                "has one"
            )

    @property
    def host(self) -> str:
        """The endpoint's host."""
        return self.endpoint.rpartition(":")[0]

    @property
    def port(self) -> int:
        """The endpoint's port."""
        return int(self.endpoint.rpartition(":")[2])


@final
class Hosts:
    """This host's part in the meetings of a run.

    Args:
        say: tells the person one sentence.

    Raises:
        LaunchError: nobody serves the store at the endpoint, or there is no such host.
    """

    def __init__(self, meeting: Meeting, say: Callable[[str], None]) -> None:
        # torch's own servers would listen on every interface
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with _quiet_torch():
            import torch.distributed as dist
        from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

        self._meeting, self._say = meeting, say
        self._address = _address_of(meeting)
        self._local = _local_address(self._address, meeting.port)
        self._interface = meeting.interface or _interface_of(self._local)
        self._store, self.serves = _open_store(dist, self._address, meeting)
        self._handler: Any = dynamic_rendezvous.DynamicRendezvousHandler.from_backend(
            meeting.run_id,
            self._store,
            c10d_rendezvous_backend.C10dRendezvousBackend(self._store, meeting.run_id),
            meeting.min_hosts,
            meeting.max_hosts,
            local_addr=self._local,
            timeout=dynamic_rendezvous.RendezvousTimeout(
                join=timedelta(seconds=meeting.join_timeout), last_call=timedelta(seconds=meeting.last_call)
            ),
            keep_alive_interval=_KEEP_ALIVE,
            keep_alive_max_attempt=_KEEP_ALIVE_MISSED,
        )
        self._round: Any = None
        self._place: HostPlace | None = None
        self.stopped_with = 0
        """The exit code of another host that was stopped."""

    def meet(self, num_ranks: int) -> HostPlace:
        """Wait for the other hosts and agree on everybody's ranks.

        Args:
            num_ranks: ranks this host brings.

        Raises:
            LaunchError: not enough hosts came in time, or the run is over elsewhere.
        """
        from torch.distributed.elastic.rendezvous.api import RendezvousError

        try:
            found = self._handler.next_rendezvous()
            store, index, count = found.store, found.rank, found.world_size
            store.set(f"ranks/{index}", str(num_ranks))
            ranks = [int(store.get(f"ranks/{host}")) for host in range(count)]
            if index == 0:
                store.set("meeting", str(self._store.add(f"{self._meeting.run_id}/meetings", 1) - 1))
            number = int(store.get("meeting"))
        except (RendezvousError, RuntimeError) as error:
            raise LaunchError(
                f"the hosts did not meet at {self._meeting.endpoint}: {self._said(error)}"
            ) from error
        self._round = store
        self._place = HostPlace(
            index=index,
            count=count,
            first_rank=sum(ranks[:index]),
            world_size=sum(ranks),
            address=self._address,
            port=self._meeting.port,
            interface=self._interface,
            meeting=number,
        )
        return self._place

    def _said(self, error: Exception) -> str:
        """Why they did not meet, and what to do. Of torch's own errors the first line is for people."""
        from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError

        least = self._meeting.min_hosts
        if isinstance(error, RendezvousClosedError):
            return "the run has ended on another host. Start it again on all of them"
        if isinstance(error, RendezvousTimeoutError):
            return (
                f"fewer than {least} came within {self._meeting.join_timeout:g} s. Is the same command running on at "
                f"least {least} host(s)?"
            )
        return (
            f"{_first_line(error)}. Is the host of the endpoint up, and is the same command running on at least "
            f"{least} host(s)?"
        )

    @contextmanager
    def watching(self, on_trouble: Callable[[Trouble, str], None]) -> Iterator[None]:
        """While entered, the others are looked at; the first trouble is told, once, in words."""
        over = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(over, on_trouble), name="nbaccel-hosts", daemon=True
        )
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event, on_trouble: Callable[[Trouble, str], None]) -> None:
        place, store = self._place, self._round
        assert place is not None
        others = [host for host in range(place.count) if host != place.index]
        seen: dict[int, tuple[int, float]] = {host: (-1, time.monotonic()) for host in others}
        beaten, beats = 0.0, 0
        while not over.wait(_LOOK):
            now = time.monotonic()
            try:
                if now - beaten >= _BEAT:
                    beats, beaten = beats + 1, now
                    store.set(f"beat/{place.index}", str(beats))
                trouble = self._trouble(others, seen, now)
            except RuntimeError as error:  # the store's connection broke
                trouble = ("lost", f"the host of {self._meeting.endpoint} is lost ({type(error).__name__})")
            if trouble is not None:
                on_trouble(*trouble)
                return

    def _trouble(
        self, others: list[int], seen: dict[int, tuple[int, float]], now: float
    ) -> tuple[Trouble, str] | None:
        store = self._round
        if store.check(["failed"]):
            host, _, ranks = store.get("failed").decode().partition(" ")
            return ("failed", f"a rank failed on host {int(host)} ({ranks[:80]})")
        if store.check(["regroup"]) or self._handler.num_nodes_waiting() > 0:
            store.set("regroup", "1")
            return ("joining", "a host joins")
        for host in others:
            if store.check([f"stopped/{host}"]):
                self.stopped_with = int(store.get(f"stopped/{host}"))
                how = _STOPS.get(self.stopped_with, f"exit code {self.stopped_with}")
                return ("stopped", f"host {host} was stopped ({how}): the run ends here too")
            if store.check([f"done/{host}"]):
                continue
            beat = int(store.get(f"beat/{host}")) if store.check([f"beat/{host}"]) else -1
            if beat != seen[host][0]:
                seen[host] = (beat, now)
            elif now - seen[host][1] > self._meeting.silence:
                return ("lost", f"host {host} has been silent for {self._meeting.silence:g} s: it is lost")
        return None

    def tell_failure(self, ranks: str) -> None:
        """Let the other hosts know that a rank failed here."""
        place = self._place
        if place is not None:
            self._quietly(lambda: self._round.set("failed", f"{place.index} {ranks}"))

    def tell_stopped(self, code: int) -> None:
        """Let the other hosts know that the run was ended here: by a person, a scheduler, or a limit of the run's.

        Args:
            code: what this host's command leaves with.
        """
        place = self._place
        if place is not None:
            self._quietly(lambda: self._round.set(f"stopped/{place.index}", str(code)))

    def wait_all_done(self, enough: Callable[[], bool]) -> tuple[Trouble, str] | None:
        """This host's ranks have ended well: wait for the others'; what came between, if anything did.

        Args:
            enough: whether to wait no longer, asked now and then.
        """
        place, store = self._place, self._round
        assert place is not None
        found: list[tuple[Trouble, str]] = []
        try:
            store.set(f"done/{place.index}", "1")
            with self.watching(lambda trouble, why: found.append((trouble, why))):
                names = [f"done/{host}" for host in range(place.count)]
                while not (found or enough() or store.check(names)):
                    time.sleep(_LOOK / 5)
        except RuntimeError:
            return None  # the store went with its host, which leaves last: all were done
        return found[0] if found else None

    def close(self) -> None:
        """Leave; the host that serves the store waits a moment for the others to have read its last words."""
        self._quietly(self._handler.shutdown)
        place = self._place
        if place is None or place.count < 2:
            return
        self._quietly(lambda: self._round.set(f"left/{place.index}", "1"))
        end = time.monotonic() + 5
        names = [f"left/{host}" for host in range(place.count)]
        while self.serves and time.monotonic() < end:
            try:
                if self._round.check(names):
                    return
            except RuntimeError:
                return
            time.sleep(0.1)

    def _quietly(self, do: Callable[[], Any]) -> None:
        """Something said to the store on the way out: when the store is gone there is nobody to be told."""
        try:
            do()
        except RuntimeError as error:
            self._say(f"the other hosts could not be told: {type(error).__name__}")


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """While torch is loaded here: what its C++ then takes for its own is the level of its log, in which a host that is
    gone leaves pages of frames. The ranks' is as the person has it."""
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "ERROR"
    try:
        yield
    finally:
        del os.environ[name]


def _first_line(error: Exception) -> str:
    """Without the frames of C++ that torch puts below."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _address_of(meeting: Meeting) -> str:
    try:
        return socket.gethostbyname(meeting.host)
    except OSError as error:
        raise LaunchError(
            f"this host finds no IPv4 address for {meeting.host!r} of --rdzv-endpoint ({error}): give the address of "
            "one of the hosts, or a name that all of them know"
        ) from error


def _open_store(dist: Any, address: str, meeting: Meeting) -> tuple[Any, bool]:
    """The store at the endpoint, and whether it is served here: by whoever has its address."""
    timeout = timedelta(seconds=_PATIENCE)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, meeting.port))  # on this one address
        listening.listen(1024)
    except OSError:  # another host's address, or another process here serves it
        listening.close()
        try:
            joining = timedelta(seconds=meeting.join_timeout)
            store = dist.TCPStore(address, meeting.port, is_master=False, timeout=joining)
        except RuntimeError as error:
            raise LaunchError(
                f"nobody answered at {meeting.endpoint} (--rdzv-endpoint) within {meeting.join_timeout:g} s: start the "
                f"command on the host whose address that is, and let that port through. ({type(error).__name__})"
            ) from error
        store.set_timeout(timeout)
        return store, False
    store = dist.TCPStore(
        address,
        meeting.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listening.detach(),
    )
    return store, True


def _local_address(address: str, port: int) -> str:
    """This host's address on the way to another; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise LaunchError(f"there is no way from here to {address}: {error}") from error
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str:
    """The name of the interface that has this address; loopback's for one that no interface lists."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    if sys.platform != "linux" or ipaddress.ip_address(address).is_loopback:
        return loopback
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR: netdevice(7)
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return loopback
