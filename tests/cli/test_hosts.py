"""Several hosts: network namespaces with a bridge between them, each with its own processes and names."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.cli.conftest import Command, said_by
from tests.conftest import wait_until

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


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Net:
    """Two hosts, 10.79.0.10 and 10.79.0.11, on a bridge of their own."""

    def __init__(self, folder: Path) -> None:
        self._name = f"nbt{os.getpid()}"
        self.hosts: list[Launched] = []
        self._names = folder / "hosts"
        # for resolv.conf too, where it names no server: nobody waits for an answer from outside
        self._names.write_text("127.0.0.1 localhost\n10.79.0.10 zero\n10.79.0.11 one\n")
        self._folder = folder
        _ip("netns", "add", f"{self._name}sw")
        _ip("-n", f"{self._name}sw", "link", "add", "br0", "type", "bridge")
        _ip("-n", f"{self._name}sw", "link", "set", "br0", "up")
        for index in range(2):
            ns = f"{self._name}h{index}"
            _ip("netns", "add", ns)
            _ip("-n", ns, "link", "set", "lo", "up")
            _ip("-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{index}", "netns",
                f"{self._name}sw")  # fmt: skip
            _ip("-n", f"{self._name}sw", "link", "set", f"v{index}", "master", "br0", "up")
            _ip("-n", ns, "addr", "add", f"10.79.0.{10 + index}/24", "dev", "eth0")
            _ip("-n", ns, "link", "set", "eth0", "up")

    def launch(self, index: int, *arguments: object, pause: float = 0.05) -> Launched:
        """`nbaccel launch` on a host."""
        own = "; ".join(f"mount --bind {self._names} {file}" for file in ("/etc/hosts", "/etc/resolv.conf"))
        setup = f'hostname h{index}; {own}; exec "$@"'
        command = ["ip", "netns", "exec", f"{self._name}h{index}", "unshare", "--mount", "--pid", "--fork",
                   "--kill-child", "--mount-proc", "--uts", "bash", "-c", setup, "_", sys.executable, "-m",
                   "nbaccel", "launch", "--config", "none", "--device", "cpu", "--no-folder",
                   "--rdzv-endpoint", "10.79.0.10:29400", *map(str, arguments)]  # fmt: skip
        host = Launched(command, self._folder, {**os.environ, "PAUSE": str(pause)})
        self.hosts.append(host)
        return host

    def cut(self, index: int) -> None:
        """Pull a host's cable."""
        _ip("-n", f"{self._name}sw", "link", "set", f"v{index}", "down")

    def listening(self, index: int) -> set[str]:
        """Addresses something listens at on a host, besides loopback."""
        command = ["ip", "netns", "exec", f"{self._name}h{index}", "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found = {line.split()[1] for line in lines if " 0A " in line}
        return {address for address in found if not address.startswith("0100007F")}

    def close(self) -> None:
        """End everything in it, then take it down."""
        for host in self.hosts:
            host.close()
        for name in ("h0", "h1", "sw"):
            _ip("netns", "del", self._name + name)


class Launched:
    """A command on a host, its output read as it comes."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, words: str, timeout: float = 60) -> re.Match[str]:
        """The first match in its output."""

        def look() -> re.Match[str] | None:
            found = re.search(words, self.output)
            assert found or self.process.poll() is None, self.output
            return found

        found: re.Match[str] = wait_until(look, timeout, f"{words!r}; so far:\n{self.output}")
        return found

    def end(self, timeout: float = 60) -> int:
        """Its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def lose_power(self) -> None:
        """SIGKILL for the first process of its namespace: everything on the host is gone."""
        self.process.kill()
        self.end()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def net(nbaccel: Command, tmp_path: Path) -> Iterator[Net]:
    """Two hosts; skipped where network namespaces cannot be made."""
    Path("train.py").write_text(dedent(TRAIN))
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("hosts are network namespaces, which need root, ip and unshare")
    try:
        made = Net(Path.cwd())
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield made
    made.close()


@pytest.mark.slow
def test_hosts_with_different_numbers_of_ranks_train_as_one(net: Net):
    one = net.launch(1, "-n", 1, "--nnodes", 2, "train.py")
    zero = net.launch(0, "-n", 2, "--nnodes", 2, "train.py")
    first = zero.wait_for(r"host (\d) of 2: rank\(s\) ([\d-]+) of 3")
    zero.wait_for("step 5")
    # the store and gloo listen on the hosts' private addresses only: 10.79.0.10 is 0A004F0A in /proc/net/tcp
    assert all(address.startswith("0A004F0A") for address in net.listening(0)), net.listening(0)
    assert all(address.startswith("0B004F0A") for address in net.listening(1)), net.listening(1)
    assert (zero.end(), one.end()) == (0, 0), zero.output + one.output
    mine = {0, 1} if first[1] == "0" else {1, 2}
    assert said_by(zero.output, "begins at 0 of 3 eth0 10.79.0.10") == mine
    assert said_by(one.output, "begins at 0 of 3 eth0 10.79.0.10") == {0, 1, 2} - mine
    assert said_by(zero.output + one.output, "ends at 40 of 3") == {0, 1, 2}


@pytest.mark.slow
def test_run_goes_on_from_its_checkpoint_when_a_host_is_lost(net: Net):
    ask = ("-n", 1, "--nnodes", "1:2", "--max-restarts", 2, "--rdzv-conf", "last_call_timeout=2",
           "--project-dir", "out", "--resume", "auto", "--set", "save_every=5")  # fmt: skip
    one = net.launch(1, *ask, "train.py", pause=0.1)
    zero = net.launch(0, *ask, "train.py", pause=0.1)
    zero.wait_for("step 15")  # the checkpoint of step 10 is complete
    assert said_by(zero.output + one.output, "begins at 0 of 2") == {0, 1}
    net.cut(1)  # nothing arrives any more, no end of a connection either
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


@pytest.mark.slow
def test_host_that_joins_is_taken_in_at_a_step_and_sigterm_stops_all(net: Net):
    ask = ("-n", 1, "--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=1", "--project-dir", "out",
           "--resume", "auto")  # fmt: skip
    zero = net.launch(0, *ask, "train.py", pause=0.25)
    zero.wait_for("begins at 0 of 1")
    zero.wait_for("step 5")
    one = net.launch(1, *ask, "train.py", pause=0.1)
    found = zero.wait_for(r"begins at (\d+) of 2")
    assert int(found[1]) > 0  # where the host alone had stopped and saved
    assert "nbaccel: a host joins" in zero.output
    one.wait_for(f"begins at {found[1]} of 2")
    one.wait_for(r"step \d+5")
    # the command is the namespace's second process; unshare passes no signal on
    children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    assert zero.end() == 0, zero.output
    one.end()
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


WAITS = """
    import time, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    print("rank", dist.get_rank(), "is there", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=["sigterm", "ctrl-c"]
)
def test_signal_to_one_host_ends_all_of_them(nbaccel: Command, tmp_path: Path, number: int, name: str):
    Path("train.py").write_text(dedent(WAITS))
    # a child of a shell without job control would ignore SIGINT
    handled = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", handled + "runpy.run_module('nbaccel', run_name='__main__', alter_sys=True)",
               "launch", "--device", "cpu", "-n", "1", "--nnodes", "2", "--no-folder", "--max-restarts", "1",
               "--rdzv-endpoint", f"127.0.0.1:{_free_port()}", "train.py"]  # fmt: skip
    hosts = [Launched(command, Path.cwd(), {**os.environ}) for _ in range(2)]
    try:
        for host in hosts:
            host.wait_for("is there")
        hosts[1].process.send_signal(number)
        assert [host.end() for host in hosts] == [128 + number] * 2, hosts[0].output + hosts[1].output
        assert re.search(
            rf"nbaccel: host [01] was stopped \({name}\): the run ends here too", hosts[0].output
        )
        assert "restart" not in hosts[0].output
    finally:
        for host in hosts:
            host.close()


@pytest.mark.slow
def test_hosts_that_do_not_come_end_the_wait(nbaccel: Command):
    Path("train.py").write_text("")
    ask = ("--device", "cpu", "-n", 1, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{_free_port()}")
    process = subprocess.run(
        [sys.executable, "-m", "nbaccel", "launch", *map(str, ask), "--rdzv-conf", "join_timeout=1", "train.py"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 125
    assert "the hosts did not meet at 127.0.0.1" in process.stderr
    assert "fewer than 2 came within 1 s" in process.stderr
    assert "on at least 2 host(s)?" in process.stderr


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.slow
def test_sigterm_ends_a_wait_for_hosts_at_once(nbaccel: Command):
    Path("train.py").write_text("")
    ask = ("--device", "cpu", "-n", 1, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{_free_port()}")
    command = [sys.executable, "-m", "nbaccel", "launch", *map(str, ask), "train.py"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: _listens(int(str(ask[-1]).rpartition(":")[2])), 40, "the store")
        process.send_signal(signal.SIGTERM)
        # before the handler is there the signal itself ends it, which a shell calls 143 too
        assert process.wait(15) in (143, -signal.SIGTERM)


def _listens(port: int) -> bool:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
