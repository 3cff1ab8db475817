"""How long calls and cells take on ranks that stay: nbaccel's session, ipyparallel's %%px, a fresh launch.

    PYTHONPATH=. python benchmarks/session.py [--ranks 4] [--rounds 5] --out build/bench

Each tool has a real Jupyter kernel of its own; they take turns, round by round, so that the machine's moods
meet all of them. Times are taken inside the kernel around the statement; figures are medians over all rounds.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels import Kernel, running_kernel

TIMED = """
import time as _time
def _timed(n, f):
    took = []
    for _ in range(n):
        start = _time.perf_counter(); f(); took.append(_time.perf_counter() - start)
    return took
def empty(): pass
def _busy(pids):
    import pathlib
    tasks = [task for pid in pids for task in pathlib.Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
def _idle(pids, seconds=5.0):
    _time.sleep(1.0)
    before = _busy(pids); _time.sleep(seconds)
    return (_busy(pids) - before) / seconds
_ip = get_ipython()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One way to have ranks at hand. Each text is a cell that prints a list of seconds."""

    name: str
    setup: str
    cells: Mapping[str, str]
    """What is measured, and how."""


def tools(ranks: int) -> list[Tool]:
    """Those that are compared."""
    return [
        Tool(
            name="nbaccel session",
            setup=f"%load_ext nbaccel\n%nbaccel start -n {ranks} --device cpu\n"
            "_session = _ip.magics_manager.registry['RankMagics'].session\n"
            "import nbaccel, os, signal",
            cells={
                "start": "%nbaccel stop\n_time.sleep(1.5)\n"
                f"start = _time.perf_counter(); s = nbaccel.Session({ranks}, device='cpu')\n"
                "took = [_time.perf_counter() - start]; s.close()\n"
                f"_ip.run_line_magic('nbaccel', 'start -n {ranks} --device cpu')\n"
                "_session = _ip.magics_manager.registry['RankMagics'].session\n"
                "_ip.run_cell_magic('ranks', '', '1+1;')\nprint('TOOK', took)",
                "empty call": "_timed(50, lambda: _session.run(empty))\n"
                "print('TOOK', _timed(300, lambda: _session.run(empty)))",
                "cell": "print('TOOK', _timed(60, lambda: _ip.run_cell_magic('ranks', '', '1+1;')))",
                "recovery": "pid = _session.state.ranks[1].pid\nos.kill(pid, signal.SIGKILL)\n"
                "start = _time.perf_counter()\n"
                "while _session.state.ranks[1].pid in (pid, None) or _session.relay.busy: _time.sleep(0.002)\n"
                "_session.run(empty)\nprint('TOOK', [_time.perf_counter() - start])",
                "idle": "print('TOOK', [_idle([one.pid for one in _session.state.ranks])])",
            },
        ),
        Tool(
            name="ipyparallel %%px",
            setup="import os\nimport ipyparallel as ipp\n"
            f"_cluster = ipp.Cluster(n={ranks}, log_level=40)\n"
            "_client = _cluster.start_and_connect_sync(activate=True)\n_view = _client[:]",
            cells={
                "start": f"start = _time.perf_counter(); c = ipp.Cluster(n={ranks}, log_level=40)\n"
                "r = c.start_and_connect_sync(); r[:].apply_sync(empty)\n"
                "took = [_time.perf_counter() - start]; r.shutdown(hub=True); print('TOOK', took)",
                "empty call": "_timed(20, lambda: _view.apply_sync(empty))\n"
                "print('TOOK', _timed(100, lambda: _view.apply_sync(empty)))",
                "cell": "print('TOOK', _timed(40, lambda: _ip.run_cell_magic('px', '', '1+1;')))",
                "idle": "print('TOOK', [_idle(_view.apply_sync(os.getpid))])",
            },
        ),
        Tool(
            name="fresh launch",
            setup=f"from nbaccel import notebook_launcher\nnotebook_launcher(empty, num_processes={ranks})",
            cells={
                "empty call": "took = []\nfor _ in range(3):\n    _time.sleep(1.0)\n"
                f"    took += _timed(1, lambda: notebook_launcher(empty, num_processes={ranks}))\n"
                "print('TOOK', took)",
            },
        ),
    ]


def main() -> int:
    """Measure, print and keep it."""
    parser = argparse.ArgumentParser(description="Time calls and cells on ranks that stay.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for session.md and session.json")
    options = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {}
    everyone = tools(options.ranks)
    with running_kernel() as first, running_kernel() as second, running_kernel() as third:
        kernels: dict[str, Kernel] = {}
        for tool, kernel in zip(everyone, (first, second, third), strict=True):
            kernel.execute(TIMED + tool.setup, timeout=180)
            kernels[tool.name] = kernel
        time.sleep(3.0)
        for _ in range(options.rounds):
            for tool in everyone:
                for what, cell in tool.cells.items():
                    found = samples.setdefault(tool.name, {}).setdefault(what, [])
                    found += _took(kernels[tool.name], cell)
        kernels["ipyparallel %%px"].execute("_client.shutdown(hub=True)")
    text = report(samples, options.ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "session.md").write_text(text)
    (options.out / "session.json").write_text(json.dumps(samples, indent=1))
    print(text)
    return 0


def _took(kernel: Kernel, cell: str) -> list[float]:
    text = kernel.execute(cell, timeout=180).text
    line = next(line for line in reversed(text.splitlines()) if line.startswith("TOOK "))
    return [float(value) for value in ast.literal_eval(line.removeprefix("TOOK "))]


def report(samples: Mapping[str, Mapping[str, Sequence[float]]], ranks: int) -> str:
    """A table of medians, in milliseconds; `idle` in milliseconds of processor time per second."""
    columns = ["start", "empty call", "cell", "recovery", "idle"]
    lines = [
        f"{ranks} ranks, {os.cpu_count()} cores, Python {platform.python_version()}; medians in ms "
        "(90th percentile); idle: processor time of all ranks in a second",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, found in samples.items():
        cells = [_figure(found[column]) if column in found else "–" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(values: Sequence[float]) -> str:
    ordered = sorted(values)
    ninetieth = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return f"{statistics.median(ordered) * 1e3:.2f} ({ninetieth * 1e3:.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
