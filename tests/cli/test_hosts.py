"""Several hosts: network namespaces with a bridge between them, each with its own processes and names."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.cli.conftest import Command, said_by
from tests.conftest import wait_until

pytestmark = pytest.mark.timeout(600)

TRAIN = """
    import os, time
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from nbaccel import Accelerator

    torch.set_num_threads(1)
    acc = Accelerator()
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.arange(960.0).reshape(-1, 4) / 960), batch_size=2)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    began = False
    for (x,) in loader:
        if not began:
            where = os.environ["GLOO_SOCKET_IFNAME"], os.environ["MASTER_ADDR"], os.environ["GROUP_RANK"]
            print("begins at", acc.steps, "of", acc.num_processes, *where, flush=True)
        began = True
        acc.step(model(x).sum(), optimizer)
        time.sleep(float(os.environ["PAUSE"]))
        if acc.steps % 5 == 0:
            print("step", acc.steps, flush=True)
    print("ends at", acc.steps, "of", acc.num_processes, "early" if acc.stopped_early else "", flush=True)
"""


WAITS = """
    import time, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    print("rank", dist.get_rank(), "is there", flush=True)
    time.sleep(600)
"""
HOST = """
    import json, os, signal, sys
    from nbaccel.cli.main import main
    from nbaccel.engines import forkserver

    # what a shell without job control starts would ignore SIGINT, and the first process of a namespace SIGTERM
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    forkserver.server_for(os.environ, "fork")
    print("the host is up", flush=True)
    for line in iter(sys.stdin.readline, ""):
        try:
            main(json.loads(line))
        except SystemExit as left:
            print("the command left with", left.code or 0, flush=True)
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """A process that does one command after another, its server warm; its output is read as it comes.

    Args:
        prefix: the command that leads into its namespace, if it has one.
    """

    def __init__(self, prefix: list[str], cwd: Path) -> None:
        self._prefix = prefix
        self._cwd = cwd
        self._process: subprocess.Popen[str] | None = None
        self._busy = False
        self.output = ""
        """Of the newest command."""

    def boot(self) -> None:
        """Start its process if it has none."""
        if self._process is None:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-c", dedent(HOST)], cwd=self._cwd, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )  # fmt: skip
            self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
            self._reader.start()
            self.wait_for("the host is up")

    def start(self, *arguments: object) -> None:
        """A command of nbaccel's."""
        self.boot()
        assert not self._busy
        self._busy = True
        self.output = ""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.output += line

    def wait_for(self, words: str) -> re.Match[str]:
        """The first match in the command's output."""

        def look() -> re.Match[str] | None:
            left = "the command left with" in self.output or not self._reader.is_alive()
            found = re.search(words, self.output)
            assert found or not left, self.output
            return found

        found: re.Match[str] = wait_until(look, 240, f"{words!r}; so far:\n{self.output}")
        return found

    def end(self) -> int:
        """The command's exit code."""
        code = int(self.wait_for(r"the command left with (\d+)\n")[1])
        self._busy = False
        return code

    def signal(self, number: int) -> None:
        """Send it to the command."""
        assert self._process is not None
        pid = self._process.pid
        if self._prefix:  # unshare passes no signal on to the namespace's first process
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, number)

    def lose_power(self) -> None:
        """SIGKILL for the first process of its namespace: everything on the host is gone."""
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return
        process.kill()
        process.wait(30)
        self._reader.join(30)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def settle(self) -> None:
        """Before the next test: what did not come to its end is ended."""
        if self._busy:
            self.lose_power()


class Net:
    """Two hosts: 10.79.0.10 and 10.79.0.11 on a bridge of their own, or both on loopback."""

    def __init__(self, folder: Path) -> None:
        self._name = f"nbt{os.getpid()}"
        self._made: list[str] = []
        names = folder / "hosts"
        # for resolv.conf too, where it names no server: nobody waits for an answer from outside
        names.write_text("127.0.0.1 localhost\n10.79.0.10 zero\n10.79.0.11 one\n")
        self._own = "; ".join(f"mount --bind {names} {file}" for file in ("/etc/hosts", "/etc/resolv.conf"))
        self.missing = self._make()
        """Why they are on loopback."""
        self.hosts = [Host([] if self.missing else self._prefix(index), folder) for index in range(2)]
        self._port = 29400
        self.endpoint = ""

    def _make(self) -> str:
        if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
            return "hosts are network namespaces, which need root, ip and unshare"
        switch = f"{self._name}sw"
        try:
            self._add(switch)
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
            for index in range(2):
                ns = f"{self._name}h{index}"
                self._add(ns)
                _ip("-n", ns, "link", "set", "lo", "up")
                _ip(
                    "-n",
                    ns,
                    "link",
                    "add",
                    "eth0",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"v{index}",
                    "netns",
                    switch,
                )
                _ip("-n", switch, "link", "set", f"v{index}", "master", "br0", "up")
                _ip("-n", ns, "addr", "add", f"10.79.0.{10 + index}/24", "dev", "eth0")
                _ip("-n", ns, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            return f"network namespaces cannot be made here: {error.stderr}"
        return ""

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)

    def _prefix(self, index: int) -> list[str]:
        setup = f'hostname h{index}; {self._own}; exec "$@"'
        return ["ip", "netns", "exec", f"{self._name}h{index}", "unshare", "--mount", "--pid", "--fork",
                "--kill-child", "--mount-proc", "--uts", "bash", "-c", setup, "_"]  # fmt: skip

    def launch(self, index: int, *arguments: object) -> Host:
        """`nbaccel launch` on a host."""
        self.hosts[index].start("launch", "--config", "none", "--device", "cpu", "--no-folder",
                                "--start-timeout", 300, "--rdzv-endpoint", self.endpoint, *arguments)  # fmt: skip
        return self.hosts[index]

    def set_cable(self, index: int, state: str) -> None:
        """Pull a host's cable ("down") or put it in again ("up")."""
        _ip("-n", f"{self._name}sw", "link", "set", f"v{index}", state)

    def listening(self, index: int) -> set[str]:
        """Where something listens on a host: address and port in hexadecimal, as the kernel writes them."""
        inside = [] if self.missing else ["ip", "netns", "exec", f"{self._name}h{index}"]
        command = [*inside, "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.split()[1] for line in lines if " 0A " in line}

    def serves(self, index: int) -> bool:
        """Whether a host serves the store."""
        port = int(self.endpoint.rpartition(":")[2])
        return any(address.endswith(f":{port:04X}") for address in self.listening(index))

    def begin(self) -> None:
        """For a test: an endpoint where nobody was yet."""
        self._port += 1
        self.endpoint = f"127.0.0.1:{_free_port()}" if self.missing else f"10.79.0.10:{self._port}"

    def settle(self) -> None:
        """After a test."""
        for index, host in enumerate(self.hosts):
            host.settle()
            if not self.missing:
                self.set_cable(index, "up")

    def close(self) -> None:
        """End everything in it, then take it down."""
        for host in self.hosts:
            host.lose_power()
        for name in self._made:
            _ip("netns", "del", name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def made(state_home: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Two hosts for the tests of the module, warm from one to the next."""
    folder = tmp_path_factory.mktemp("hosts")
    for name, text in (("train.py", TRAIN), ("waits.py", WAITS)):
        (folder / name).write_text(dedent(text))
    net = Net(folder)
    yield net
    net.close()


@pytest.fixture
def pair(made: Net) -> Iterator[Net]:
    """Two hosts, be they on loopback."""
    made.begin()
    yield made
    made.settle()


@pytest.fixture
def net(pair: Net) -> Net:
    """Two hosts with a cable each; skipped where network namespaces cannot be made."""
    if pair.missing:
        pytest.skip(pair.missing)
    return pair


@pytest.mark.slow
def test_hosts_with_different_numbers_of_ranks_train_as_one(net: Net):
    one = net.launch(1, "-n", 1, "--nnodes", 2, "--env", "PAUSE=0.05", "train.py")
    zero = net.launch(0, "-n", 2, "--nnodes", 2, "--env", "PAUSE=0.05", "train.py")
    first = zero.wait_for(r"host (\d) of 2: rank\(s\) ([\d-]+) of 3")
    zero.wait_for("step 5")
    # besides loopback the store and gloo listen on the hosts' private addresses only: 10.79.0.10 is 0A004F0A
    for index, private in enumerate(("0A004F0A:", "0B004F0A:")):
        found = net.listening(index)
        assert all(address.startswith(("0100007F:", private)) for address in found), found
    assert (zero.end(), one.end()) == (0, 0), zero.output + one.output
    mine = {0, 1} if first[1] == "0" else {1, 2}
    assert said_by(zero.output, "begins at 0 of 3 eth0 10.79.0.10") == mine
    assert said_by(one.output, "begins at 0 of 3 eth0 10.79.0.10") == {0, 1, 2} - mine
    assert said_by(zero.output + one.output, "ends at 40 of 3") == {0, 1, 2}


@pytest.mark.slow
def test_host_that_joins_is_taken_in_at_a_step_and_sigterm_stops_all(net: Net, tmp_path: Path):
    ask = ("-n", 1, "--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=1", "--project-dir", tmp_path,
           "--resume", "auto")  # fmt: skip
    zero = net.launch(0, *ask, "--env", "PAUSE=0.25", "train.py")
    zero.wait_for("begins at 0 of 1")
    zero.wait_for("step 5")
    one = net.launch(1, *ask, "--env", "PAUSE=0.1", "train.py")
    found = zero.wait_for(r"begins at (\d+) of 2")
    assert int(found[1]) > 0  # where the host alone had stopped and saved
    assert "nbaccel: a host joins" in zero.output
    one.wait_for(f"begins at {found[1]} of 2")
    one.wait_for(r"step \d*[05]\b")
    one.signal(signal.SIGTERM)
    assert (zero.end(), one.end()) == (0, 128 + signal.SIGTERM), zero.output + one.output
    stopped = re.search(r"ends at (\d+) of 2 early", one.output)
    assert stopped, one.output
    assert f"ends at {stopped[1]} of 2 early" in zero.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint"),
        (["--nnodes", "two", "--rdzv-endpoint", "a:1"], "write N or MIN:MAX"),
        (["--nnodes", "0"], "--nnodes is '0': write N or MIN:MAX, from 1"),
        (["--rdzv-conf", "silence=abc"], "--rdzv-conf is for hosts that meet"),
        (["--rdzv-id", "mine"], "--rdzv-id is for hosts that meet"),
        (["--interface", "eth0"], "--interface is for hosts that meet"),
        (["--nnodes", "2", "--rdzv-endpoint", "[::1]:29400"], "hosts meet over IPv4"),
        (["--nnodes", "3:2", "--rdzv-endpoint", "127.0.0.1:1"], "--nnodes is 3:2"),
        (["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1"], "write host:port"),
        (["--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", "timeout=3"], "--rdzv-conf has no 'timeout'"),
        (["--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", "silence=soon"], "silence is 'soon'"),
    ],
)
def test_meeting_that_cannot_be_is_refused(nbaccel: Command, arguments: list[str], words: str):
    Path("train.py").write_text("")
    done = nbaccel("launch", *arguments, "train.py")
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("no-such-host.invalid:29400", "finds no IPv4 address for 'no-such-host.invalid' of --rdzv-endpoint"),
        # an address that no host has; where there is no network there is no way to it
        (
            "192.0.2.1:29400",
            r"within 1 s: start the command on the host|there is no way from here to 192\.0\.2\.1",
        ),
    ],
)
def test_endpoint_where_nobody_is_ends_the_command(nbaccel: Command, endpoint: str, words: str):
    Path("train.py").write_text("")
    done = nbaccel("launch", "--device", "cpu", "-n", 1, "--nnodes", 2, "--rdzv-endpoint", endpoint,
                   "--rdzv-conf", "join_timeout=1", "train.py")  # fmt: skip
    assert done.code == 125, done.err
    assert re.search(words, done.err)
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=["sigterm", "ctrl-c"]
)
def test_signal_to_one_host_ends_all_of_them(pair: Net, number: int, name: str):
    hosts = [pair.launch(at, "-n", 1, "--nnodes", 2, "--max-restarts", 1, "waits.py") for at in range(2)]
    for host in hosts:
        host.wait_for("is there")
    hosts[1].signal(number)
    assert [host.end() for host in hosts] == [128 + number] * 2, hosts[0].output + hosts[1].output
    assert re.search(rf"nbaccel: host [01] was stopped \({name}\): the run ends here too", hosts[0].output)
    assert "restart" not in hosts[0].output


@pytest.mark.slow
def test_hosts_that_do_not_come_end_the_wait(pair: Net):
    host = pair.launch(0, "-n", 1, "--nnodes", 2, "--rdzv-conf", "join_timeout=1", "waits.py")
    assert host.end() == 125
    assert f"the hosts did not meet at {pair.endpoint}" in host.output
    assert "fewer than 2 came within 1 s" in host.output
    assert "on at least 2 host(s)?" in host.output


@pytest.mark.slow
def test_sigterm_ends_a_wait_for_hosts_at_once(pair: Net):
    host = pair.launch(0, "-n", 1, "--nnodes", 2, "waits.py")
    wait_until(lambda: pair.serves(0), 240, "the store")
    host.signal(signal.SIGTERM)
    assert host.end() == 128 + signal.SIGTERM


# The last of this file: a host that was lost starts anew, cold.
@pytest.mark.slow
def test_run_goes_on_from_its_checkpoint_when_a_host_is_lost(net: Net, tmp_path: Path):
    ask = ("-n", 1, "--nnodes", "1:2", "--max-restarts", 2, "--rdzv-conf", "last_call_timeout=2",
           "--project-dir", tmp_path, "--resume", "auto", "--set", "save_every=5",
           "--env", "PAUSE=0.1")  # fmt: skip
    one = net.launch(1, *ask, "train.py")
    zero = net.launch(0, *ask, "train.py")
    zero.wait_for("step 15")  # the checkpoint of step 10 is complete
    assert said_by(zero.output + one.output, "begins at 0 of 2") == {0, 1}
    net.set_cable(1, "down")  # nothing arrives any more, no end of a connection either
    again = zero.wait_for(r"begins at (\d+) of 1")
    assert int(again[1]) >= 10
    assert int(again[1]) % 5 == 0
    assert "restart 1 of 2" in zero.output
    assert re.search(r"host [01] has been silent for 5 s: it is lost", zero.output)
    one.lose_power()
    assert zero.end() == 0, zero.output
    steps = int(again[1])
    # two samples a rank: two ranks have seen 4 of the 240 in each step, one sees 2
    assert f"ends at {steps + (240 - 4 * steps) // 2} of 1" in zero.output
