"""What the panel costs: the notebook's process, the page, a rank.

    python benchmarks/dashboard.py [--seconds 5] [--rounds 8] [--out build/bench]

Simulated ranks: events are folded and painted as the relay does it, at ten events a second from each, into
an output that counts bytes. Nothing else runs in the process. Real ranks, in a real kernel: how soon a cell's
panel is there, and what a training loop loses by being shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nbaccel.notebook.dashboard import Panel
from nbaccel.rank.bars import relay_bars
from nbaccel.session.panel.reading import Heading
from nbaccel.session.sinks.limit import Limit
from nbaccel.session.sinks.text import TextSink
from nbaccel.session.state import fold, new_state
from nbaccel.wire.events import Event, Metric, Output, Progress, Status, connect

EVENTS_PER_SECOND = 10


class CountingCell:
    """A notebook's cell that counts what would be sent to the page."""

    kernel = None
    running = True

    def __init__(self) -> None:
        self.outputs = self.bytes = 0

    def show(self, data: Any, **_: Any) -> None:
        self.outputs += 1
        self.bytes += len(json.dumps(data))


def ranks_at_work(num_ranks: int, seconds: float) -> dict[str, float]:
    """CPU share and bytes per repaint with this many ranks for so many seconds."""
    cell: Any = CountingCell()
    state = new_state(num_ranks, time.time())
    panel = Panel(cell, Heading(name="train"), state, actions=None, label=lambda _: None)
    for rank in range(num_ranks):
        state = fold(state, Status(rank=rank, state="running", pid=1))
    started, cpu = time.monotonic(), time.process_time()
    step = 0
    while time.monotonic() - started < seconds:
        step += 5
        for rank in range(num_ranks):
            for event in events_of(rank, step):
                state = fold(state, event)
                panel.handle(event, state)
        for _ in range(5):  # five beats of the relay
            panel.tick(time.monotonic())
            time.sleep(max(0.0, started + step / 50 + _ * 0.02 - time.monotonic()))
    wall = time.monotonic() - started
    return {
        "ranks": num_ranks,
        "cpu_percent": 100 * (time.process_time() - cpu) / wall,
        "repaints_per_second": cell.outputs / 2 / wall,
        "kib_per_repaint": 2 * cell.bytes / cell.outputs / 1024,
    }


def events_of(rank: int, step: int) -> list[Event]:
    """What a rank says in a tenth of a second: one event, each second one with metrics."""
    times = {"data": 0.01, "forward": 0.03, "backward": 0.05, "optimizer": 0.01}
    if step // 5 % 2:
        return [Progress(rank=rank, name="train", step=step, total=100_000, unit="batch", times=times)]
    return [Metric(rank=rank, values={"loss": 2 / (1 + step), "accuracy": step / 1e5}, step=step)]


def flood(num_lines: int = 1_000_000) -> dict[str, float]:
    """A million lines of output: seconds, growth of the process, characters printed in the cell."""
    printed = 0

    def write(text: str, stream: str) -> None:
        nonlocal printed
        printed += len(text)

    cell: Any = CountingCell()
    state = new_state(4, time.time())
    panel = Panel(cell, Heading(name="flood"), state, actions=None, label=lambda _: None)
    limit = Limit(write)
    text = TextSink(limit, num_ranks=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.monotonic(), time.process_time()
    for at in range(0, num_lines, 1000):
        data = b"".join(
            b"line %d of many, some sixty characters in length, no more\n" % (at + i) for i in range(1000)
        )
        event = Output(rank=at // 1000 % 4, stream="stdout", data=data)
        state = fold(state, event)
        panel.handle(event, state)
        text.handle(event, state)
        panel.tick(time.monotonic())
        text.tick(time.monotonic())
    text.close(state)
    limit.close(state)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "lines": num_lines,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "growth_mib": (after - before) / 1024,
        "characters_in_cell": printed,
        "page_mib": cell.bytes / 2**20,
    }


def progress_step(count: int = 2_000_000) -> dict[str, float]:
    """Nanoseconds a tqdm step costs in a rank, as it is and with its bar relayed."""
    from tqdm import tqdm

    class Port:
        emitted = 0

        def emit(self, event: Event) -> None:
            self.emitted += 1

        def requests(self) -> list[Any]:
            return []

    def measure() -> float:
        best = float("inf")
        for _ in range(3):
            with open(os.devnull, "w") as nowhere:
                started = time.perf_counter()
                for _ in tqdm(range(count), file=nowhere):
                    pass
                best = min(best, time.perf_counter() - started)
        return best / count * 1e9

    plain = measure()
    port = Port()
    connect(port)
    relay_bars(quiet=True)
    relayed = measure()
    connect(None)
    return {"tqdm_ns": plain, "relayed_ns": relayed, "added_ns": relayed - plain, "events": port.emitted}


TRAINING = """
import time
from nbaccel import notebook_launcher
def train(steps):
    import torch
    from nbaccel import Accelerator
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    data = torch.utils.data.TensorDataset(torch.randn(steps * 16, 64), torch.randn(steps * 16, 1))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), torch.utils.data.DataLoader(data, batch_size=16)
    )
    started = time.perf_counter()
    for step, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        accelerator.backward(loss)
        optimizer.step()
        if step % 20 == 0:
            accelerator.log({"loss": loss}, step=step)
    return (time.perf_counter() - started) / steps
notebook_launcher(int, num_processes=1)
"""


class LiveKernel:
    """An ipykernel that takes its front end for a live JupyterLab."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        root = str(Path(__file__).resolve().parent.parent)
        self._manager = KernelManager()
        env = {**os.environ, "PYTHONPATH": root, "JPY_SESSION_NAME": "benchmark.ipynb"}
        self._manager.start_kernel(env=env)
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def run(self, code: str) -> tuple[float, str]:
        """Seconds until the cell's first output, and its value in words.

        Raises:
            RuntimeError: the cell failed.
        """
        started = time.perf_counter()
        request = self._client.execute(code, allow_stdin=True)
        first, value = 0.0, ""
        while True:
            message = self._client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "display_data" and not first:
                first = time.perf_counter() - started
            if kind == "error":
                raise RuntimeError("\n".join(content["traceback"]))
            if kind == "execute_result":
                value = content["data"]["text/plain"]
            if kind == "status" and content["execution_state"] == "idle":
                return first, value

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def in_a_kernel(rounds: int, steps: int = 1500) -> dict[str, Any]:
    """Seconds until the panel is there, and a step's time with the panel over that without, in turns."""
    kernel = LiveKernel()
    try:
        kernel.run(TRAINING)
        firsts, ratios, seconds = [], [], []
        for at in range(rounds):
            times = {}
            # who comes first takes turns, too
            for shown in (True, False) if at % 2 else (False, True):
                first, value = kernel.run(f"notebook_launcher(train, ({steps},), 1, dashboard={shown})[0]")
                times[shown] = float(value)
                if shown:
                    firsts.append(first)
            ratios.append(times[True] / times[False])
            seconds.append(times[False])
    finally:
        kernel.close()
    return {
        "panel_after_s": statistics.median(firsts),
        "panel_after_s_worst": max(firsts),
        "step_us": 1e6 * statistics.median(seconds),
        "slowdown_median": statistics.median(ratios),
        "slowdown_range": [min(ratios), max(ratios)],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"ranks": []}
    for num_ranks in (4, 64, 256):
        results["ranks"].append(ranks_at_work(num_ranks, options.seconds))
        print(results["ranks"][-1], flush=True)
    for name, measure in (("flood", flood), ("progress", progress_step)):
        results[name] = measure()
        print(name, results[name], flush=True)
    results["kernel"] = in_a_kernel(options.rounds)
    print("kernel", results["kernel"], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "dashboard.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
