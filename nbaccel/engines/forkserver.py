"""The notebook's side of the warm server: start it, tell it what to import, ask it for runs.

There is one per process and start method, kept between launches; it ends with the process. What is read
when a library loads is frozen in it, so a change of such a variable, or of a preloaded package on disk,
brings a fresh one.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import select
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import final

from nbaccel.engines.parent import Launch
from nbaccel.engines.server import WARM_UP, Hurry, Template
from nbaccel.engines.template import Preload, Preloaded
from nbaccel.errors import LaunchError
from nbaccel.wire.channel import Channel, ChannelClosed, pair

__all__ = ["ForkServer", "close_ended", "server_for", "shut_down"]

_FROZEN = (
    "TORCH",
    "PYTORCH",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "KMP_",
    "GOMP_",
    "LD_",
    "MALLOC_",
    "PYTHON",
    "CUDA_",
)
_NOT_FROZEN = (
    # Read when a device is first used, which no server does: they may differ from launch to launch.
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    # Libraries set these in the notebook by themselves (torch._dynamo, scikit-learn, joblib, Fabric),
    # and what reads them does so at use or only warns.
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    # Read when a process group is made; several hosts' launches set it here.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
)
# The notebook's own machinery: it starts threads and means nothing in a rank.
_FRONT_END = {"debugpy", "ipykernel", "jupyter_client", "jupyter_core", "nbaccel", "pydevd", "tornado", "zmq"}
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@final
class ForkServer:
    """A guardian, its server and the current template, as seen from the notebook's process.

    Args:
        environ: environment of the server; its frozen variables hold in every run.
        start_method: "fork" for a server warmed up with torch, "spawn" for a bare one.
        lean: warm up with torch alone: the first rank runs 1.5 s sooner, and its first DDP step comes later.
    """

    def __init__(self, environ: Mapping[str, str], start_method: str, *, lean: bool = False) -> None:
        self.start_method = start_method
        self._lock = threading.RLock()
        self._frozen = frozen(environ)
        self._seen: set[str] = set()
        self._wanted: list[str] = []
        self._without: tuple[str, ...] = ()
        self._hurried = False
        self._stamps = {name: stamp for name in WARM_UP if "." not in name and (stamp := _stamp(name))}
        self._log = tempfile.TemporaryFile(prefix="nbaccel-server-")  # noqa: SIM115  # as long as the server
        ours, theirs = pair()
        read, self._lifeline = os.pipe()
        fds = (theirs.fileno(), read, self._log.fileno())
        code = (
            f"import sys; sys.path[:] = {[*_installed_path(), _HOME]!r}; from nbaccel.engines import guardian; "
            f"guardian.main({fds[0]}, {fds[1]}, {os.getpid()}, {fds[2]}, {start_method!r}, {lean})"
        )
        self._guardian = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=fds,
            env={**environ, **_kept_from_loading()},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Jupyter interrupts by killpg
        )
        theirs.close()
        os.close(read)
        self._server = Channel(ours)
        self._template = self._new_template()

    def _new_template(self) -> Channel:
        ours, theirs = pair()
        order = Template(tuple(_installed_path()), tuple(self._wanted), self._without)
        with theirs:
            self._server.send(order, (theirs.fileno(),))
        return Channel(ours)

    def outdated(self, environ: Mapping[str, str]) -> str | None:
        """Why this server cannot serve a launch now; None when it can."""
        if self._guardian.poll() is not None or _hung_up(self._server):
            return "the previous one ended"
        if changed := sorted(name for name, _ in self._frozen.items() ^ frozen(environ).items()):
            return f"{', '.join(dict.fromkeys(changed))} changed, which libraries read when they load"
        changed = sorted(name for name, stamp in self._stamps.items() if _stamp(name) != stamp)
        return f"{', '.join(changed)} changed on disk" if changed else None

    def preload(self) -> None:
        """Tell the template what this process has imported since the last time."""
        with self._lock:
            self._preload()

    def _preload(self) -> None:
        fresh = [name for name in list(sys.modules) if name not in self._seen]
        self._seen.update(fresh)
        wanted = [name for name in fresh if _worth_preloading(name)]
        if wanted and self.start_method == "fork":
            self._wanted += wanted
            for package in {name.partition(".")[0] for name in wanted}:
                if stamp := _stamp(package):
                    self._stamps.setdefault(package, stamp)
            self._template.send(Preload(tuple(wanted)))

    def _hurry(self) -> None:
        """Before the first launch: the server may still be at what can wait."""
        if not self._hurried:
            self._hurried = True
            self._server.send(Hurry())

    def do_without(self, package: str) -> None:
        """Replace the template by one that never imports `package`."""
        with self._lock:
            if package in self._without:
                return  # another launch, on another thread, met it first
            self._without = (*self._without, package)
            self._template.close()
            self._template = self._new_template()

    def launch(self, launch: Launch, fds: Sequence[int]) -> list[str]:
        """Ask the template for a run; what it had to say meanwhile, for the person to read.

        Raises:
            ChannelClosed: the server is gone.
        """
        with self._lock:
            try:
                self._hurry()
                if _hung_up(self._template):
                    raise ChannelClosed("the template has ended")
                self._preload()
                self._template.send(launch, fds)
            except ChannelClosed:  # somebody killed it: the server makes another
                self._template.close()
                self._template = self._new_template()
                self._template.send(launch, fds)
            messages = [message for message, _ in self._template.drain()]
        notes = []
        for message in messages:
            assert isinstance(message, Preloaded)
            notes += [
                f"{package} could not be imported ahead of the ranks, which import it themselves ({why})"
                for package, why in message.failures
            ]
        return notes

    def log(self) -> str:
        """The last lines the processes behind this printed."""
        if self._log.closed:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:].strip()

    def retire(self) -> None:
        """Take no more runs; end with the last one that is under way."""
        self._template.close()
        self._server.close()

    @property
    def lost(self) -> bool:
        """Whether the server or the template has ended: what it was asked last may not have been done."""
        return _hung_up(self._server) or _hung_up(self._template)

    @property
    def ended(self) -> bool:
        """Whether no process of it is left."""
        return self._guardian.poll() is not None

    def close(self) -> None:
        """End the server and everything below it; may be called twice."""
        self._template.close()
        self._server.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            self._guardian.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        self._log.close()

    def abandon(self) -> None:
        """In a fork of this process: let go of what belongs to the original."""
        self._template.close()
        self._server.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._guardian.returncode = 0  # not a child of this process


_servers: dict[str, ForkServer] = {}
_retired: list[ForkServer] = []
_lock = threading.RLock()


def server_for(
    environ: Mapping[str, str], start_method: str, *, lean: bool = False
) -> tuple[ForkServer, list[str]]:
    """The warm server for a launch with this environment, and what to tell the person about it.

    Args:
        lean: if there is none yet, one that is sooner ready will do.

    Raises:
        LaunchError: it cannot be started.
    """
    with _lock:
        notes = []
        close_ended()
        server = _servers.get(start_method)
        if server is not None and (reason := server.outdated(environ)):
            notes.append(f"starting a fresh server for the ranks: {reason}")
            old = _servers.pop(start_method)
            old.retire()  # another launch may be running there
            _retired.append(old)
            server = None
        if server is None:
            try:
                server = _servers[start_method] = ForkServer(environ, start_method, lean=lean)
            except (OSError, ChannelClosed) as error:
                raise LaunchError(f"the process that makes ranks could not be started: {error}") from error
        return server, notes


def close_ended() -> None:
    """Let go of the descriptors of servers that were replaced and whose last run has ended since."""
    with _lock:
        for old in [old for old in _retired if old.ended]:
            _retired.remove(old)
            old.close()


def shut_down() -> None:
    """End every server of this process, and the runs below it."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()
        while _retired:
            _retired.pop().close()


def _abandon_all() -> None:
    global _lock
    _lock = threading.RLock()
    while _servers:
        _servers.popitem()[1].abandon()
    while _retired:
        _retired.pop().abandon()


atexit.register(shut_down)
os.register_at_fork(after_in_child=_abandon_all)


def _kept_from_loading() -> dict[str, str]:
    """TorchTPU is loaded with torch where it is installed, and starts a thread: not in processes that are forked.
    Ranks on its chips import it themselves."""
    return {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if importlib.util.find_spec("torch_tpu") else {}


def frozen(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables libraries read when they load."""
    return {k: v for k, v in environ.items() if k.startswith(_FROZEN) and k not in _NOT_FROZEN}


def _worth_preloading(name: str) -> bool:
    """Whether this module of this process is an installed one that a rank could want."""
    if name.partition(".")[0] in _FRONT_END or "__main__" in name:
        return False
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        origin = getattr(spec, "origin", None)
        if not origin or getattr(spec, "name", None) != name:
            return False
    except Exception:  # noqa: BLE001  # what stands in for a module until it is used may raise anything
        return False
    # debugpy imports copies that lie inside its own folder; a rank would not find those by that name.
    top = name.partition(".")[0]
    return str(origin).startswith(
        tuple(folder + top + end for folder in _site_folders() for end in (os.sep, "."))
    )


@functools.cache
def _site_folders() -> tuple[str, ...]:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        folders.add(site.getusersitepackages())
    return tuple(folder + os.sep for folder in folders)


def _installed_path() -> list[str]:
    """sys.path without the user's own folders: a file random.py there must not shadow the library's."""
    roots = (sys.prefix, sys.base_prefix, *(folder.rstrip(os.sep) for folder in _site_folders()))
    # what is no text Python passes over too, as a Path that somebody has appended
    return [entry for entry in sys.path if isinstance(entry, str) and entry.startswith(roots)]


def _hung_up(channel: Channel) -> bool:
    """Whether the process at the other end has ended, even if what it sent is not read yet."""
    if channel.fileno() < 0:
        return False  # retired by us: it goes on until its last run has ended
    poll = select.poll()
    poll.register(channel.fileno(), 0)
    return bool(poll.poll(0))


def _stamp(package: str) -> tuple[int, int] | None:
    """When a package's files were last installed; None for what is not a file."""
    try:
        spec = importlib.util.find_spec(package)
        origin = spec.origin if spec else None
        status = os.stat(origin) if origin else None
    except (ImportError, ValueError, OSError):
        return None
    return (status.st_mtime_ns, status.st_size) if status else None
