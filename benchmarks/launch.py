"""How long from a notebook cell to ranks at work, for nbaccel and the launchers people use today.

    python benchmarks/launch.py [--quick] [--only light heavy cold arguments relay] --out build/bench

Everything runs in real Jupyter kernels, the launchers in turn within each round so that the machine's moods
meet all of them; figures are medians. Prints the tables of the README and leaves them, with every single
sample, in the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from kernels import Cell, Kernel, pss_bytes, running_kernel
from peers import ACCELERATE, ACCELERATE_DYNAMO, NBACCEL, PEERS, Peer
from tables import Sample, report

IDLE = 4.0
"""Seconds between the imports of a kernel and its first warm launch: somebody reading his cell."""
MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure."""

    sizes: Sequence[int]
    rounds: int
    cold_rounds: int
    argument_rounds: int
    object_bytes: int
    lines: int


FULL = Plan(
    sizes=(2, 4, 8), rounds=7, cold_rounds=3, argument_rounds=3, object_bytes=1000 * MB, lines=200_000
)
QUICK = Plan(sizes=(2, 4), rounds=3, cold_rounds=1, argument_rounds=1, object_bytes=200 * MB, lines=50_000)


def main() -> int:
    """Measure what was asked, print and keep it."""
    parser = argparse.ArgumentParser(description="Time launches of ranks from real notebook kernels.")
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of half an hour")
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), default=sorted(SCENARIOS))
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="numbers of ranks; default: 2 4, and 8 unless --quick"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for launch.md and launch.json")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the kernels are ended too
    plan = QUICK if options.quick else FULL
    plan = replace(plan, sizes=options.sizes or plan.sizes)
    samples: list[Sample] = []
    for scenario in ("light", "heavy", "cold", "arguments", "relay"):
        if scenario in options.only:
            started = time.monotonic()
            samples += SCENARIOS[scenario](plan)
            _say(f"{scenario}: measured in {time.monotonic() - started:.0f} s")
            _keep(samples, options.out)  # after each, for whoever stops it before the end
    print(report(samples))
    return 0


def _keep(samples: Sequence[Sample], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "launch.md").write_text(report(samples))
    (folder / "launch.json").write_text(json.dumps([sample.as_dict() for sample in samples], indent=1))


def measure_light(plan: Plan) -> list[Sample]:
    """Warm launches in kernels that imported torch and the launcher."""
    return _measure_warm(plan, scenario="light", heavy=False)


def measure_heavy(plan: Plan) -> list[Sample]:
    """Warm launches in kernels that imported transformers' Trainer and more, of functions that import it too."""
    return _measure_warm(plan, scenario="heavy", heavy=True)


def _measure_warm(plan: Plan, *, scenario: str, heavy: bool) -> list[Sample]:
    samples: list[Sample] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def prepared(peer: Peer) -> Kernel:
            kernel = stack.enter_context(running_kernel())
            kernel.execute(peer.setup(heavy=heavy, folder=Path(folder)))
            return kernel

        # Trainer imports torch._dynamo by itself.
        peers = [peer for peer in PEERS if not (heavy and peer is ACCELERATE_DYNAMO)]
        kernels = {peer.name: prepared(peer) for peer in peers}
        time.sleep(IDLE)
        for turn in range(plan.rounds + 1):  # the first is not counted: it warms the file cache
            first = turn % len(peers)  # who follows whom is another each round: a launch leaves caches behind
            for peer in (*peers[first:], *peers[:first]):
                if (turn - 1) % peer.every:
                    continue
                for n in plan.sizes if turn else plan.sizes[:1]:
                    try:
                        values = _warm_times(kernels[peer.name], peer, n)
                    except (RuntimeError, TimeoutError) as error:
                        _say(f"{scenario}: {peer.name} on {n} ranks, in a fresh kernel from here on: {error}")
                        samples.append(Sample(scenario, peer.name, n, "failed", 1))
                        kernels[peer.name] = prepared(peer)
                        time.sleep(IDLE)
                        continue
                    if turn:
                        samples += [
                            Sample(scenario, peer.name, n, what, value) for what, value in values.items()
                        ]
    return samples


def _warm_times(kernel: Kernel, peer: Peer, n: int) -> dict[str, float]:
    times = _step_times(kernel, peer, n)
    return {**times, "cell": kernel.execute(peer.call("nothing", "", n)).seconds}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure_cold(plan: Plan) -> list[Sample]:
    """The first cell of a fresh kernel: imports, definitions and launch together."""
    samples: list[Sample] = []
    for turn in range(plan.cold_rounds):
        for peer in PEERS:
            if turn % peer.every:
                continue
            for n in plan.sizes:
                try:
                    with running_kernel() as kernel, tempfile.TemporaryDirectory() as folder:
                        before = peer.setup(heavy=False, folder=Path(folder)) + "\n"
                        values = _step_times(kernel, peer, n, before=before)
                except (RuntimeError, TimeoutError) as error:
                    _say(f"cold: {peer.name} on {n} ranks: {error}")
                    samples.append(Sample("cold", peer.name, n, "failed", 1))
                    continue
                samples += [Sample("cold", peer.name, n, what, value) for what, value in values.items()]
    return samples


def _step_times(kernel: Kernel, peer: Peer, n: int, *, before: str = "") -> dict[str, float]:
    """Seconds from sending the cell until the last of n ranks had come to each mark."""
    with tempfile.TemporaryDirectory() as folder:
        cell = kernel.execute(before + peer.call("measured", f"{folder!r}, make_group,", n))
        marks = _marks(Path(folder), n)
    return {
        "function": max(mark["imported"] for mark in marks) - cell.sent,
        "group": max(mark["grouped"] for mark in marks) - cell.sent,
        "step": max(mark["stepped"] for mark in marks) - cell.sent,
    }


def _marks(folder: Path, n: int) -> list[dict[str, float]]:
    files = sorted(folder.glob("*.json"))
    if len(files) != n:
        raise RuntimeError(f"{len(files)} of {n} ranks left their times: {[file.name for file in files]}")
    return [json.loads(file.read_text()) for file in files]


ARGUMENTS = {
    "256 MB tensor": "value = torch.ones(64_000_000)",
    "Python objects": "value = [dict(id=i, label=i % 10, text=str(i).rjust(1000)) for i in range({rows})]",
}
ROW_BYTES = 1000 + 49 + 184 + 32  # the string, its header, the dict, the int


def measure_arguments(plan: Plan) -> list[Sample]:
    """Time and memory of a launch on 4 ranks that all read a large argument; beside a fork, which sends nothing."""
    samples: list[Sample] = []
    for _ in range(plan.argument_rounds):
        for kind, source in ARGUMENTS.items():
            for peer in (NBACCEL, ACCELERATE):
                values = _argument_costs(peer, source.format(rows=plan.object_bytes // ROW_BYTES))
                samples += [Sample(kind, peer.name, 4, what, value) for what, value in values.items()]
    return samples


def _argument_costs(peer: Peer, source: str) -> dict[str, float]:
    """Seconds and bytes of a launch with and without the argument that `source` makes in the kernel."""
    # One thread: a fork of a kernel whose thread pool has worked hangs in its first parallel sum.
    with running_kernel(env={"OMP_NUM_THREADS": "1"}) as kernel, tempfile.TemporaryDirectory() as folder:
        kernel.execute(peer.setup(heavy=False, folder=Path(folder)))
        kernel.execute(source)
        time.sleep(IDLE)
        _read_argument(kernel, peer, "None")
        without_seconds, without_pss = _read_argument(kernel, peer, "None")
        with_seconds, with_pss = _read_argument(kernel, peer, "value")
        copy = kernel.execute(COPY)
    return {
        "seconds": with_seconds,
        "seconds without": without_seconds,
        "pss": with_pss,
        "pss without": without_pss,
        "copy": float(copy.text),
    }


COPY = """
import time
start = time.monotonic()
copied = value.clone() if isinstance(value, torch.Tensor) else None
print(time.monotonic() - start)
"""


def _read_argument(kernel: Kernel, peer: Peer, argument: str, *, n: int = 4) -> tuple[float, int]:
    """Seconds until all ranks have read the argument, and the PSS of kernel and descendants then."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        message, sent = kernel.send(peer.call("reads", f"{name!r}, {argument},", n))
        try:
            while len(list(folder.glob("*.json"))) < n and time.monotonic() < sent + 120:
                time.sleep(0.02)
            held = pss_bytes(kernel.processes())
        finally:
            (folder / "go").touch()
        kernel.finish(message, sent)
        marks = _marks(folder, n)
    return max(mark["read"] for mark in marks) - sent, held


SLOW_LINES = 3_000
"""A fork prints through the kernel's own stream, some hundred lines a second."""
LINE = re.compile(r"<(\d+): *(\d+)>x{86}$", re.MULTILINE)


def measure_relay(plan: Plan) -> list[Sample]:
    """Lines of 100 characters per second from printing ranks, and how many arrived whole."""
    samples: list[Sample] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for peer in (NBACCEL, ACCELERATE):
            kernel = stack.enter_context(running_kernel())
            kernel.execute(peer.setup(heavy=False, folder=Path(folder)))
            time.sleep(IDLE)
            for n in (2, 4):
                kernel.execute(peer.call("nothing", "", n))
                empty = kernel.execute(peer.call("nothing", "", n)).seconds
                each = plan.lines if peer is NBACCEL else SLOW_LINES
                cell = kernel.execute(peer.call("chatters", f"{each},", n), timeout=300)
                whole = _whole_lines(peer, kernel, cell, n)
                lines = n * each
                samples += [
                    Sample(
                        "relay", peer.name, n, "lines per second", lines / max(cell.seconds - empty, 1e-3)
                    ),
                    Sample("relay", peer.name, n, "whole", whole / lines),
                ]
    return samples


def _whole_lines(peer: Peer, kernel: Kernel, cell: Cell, n: int) -> int:
    """How many different lines arrived intact: in the ranks' logs where there are any, else in the cell."""
    text = cell.text
    if peer is NBACCEL:
        with tempfile.TemporaryDirectory() as folder:
            kernel.execute(
                f"import nbaccel, pathlib\nfor r in range({n}):"
                f" pathlib.Path({folder!r}, str(r)).write_text(nbaccel.last_run().logs(r))"
            )
            text = "\n".join(path.read_text() for path in sorted(Path(folder).iterdir()))
    return len(set(LINE.findall(text)))


SCENARIOS: dict[str, Callable[[Plan], list[Sample]]] = {
    "light": measure_light,
    "heavy": measure_heavy,
    "cold": measure_cold,
    "arguments": measure_arguments,
    "relay": measure_relay,
}


if __name__ == "__main__":
    sys.exit(main())
