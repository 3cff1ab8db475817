"""Models larger than memory: nbaccel beside accelerate, in one run, on the CPU.

    python benchmarks/offload.py [--rounds 15] [--megabytes 200] [--checkpoint-megabytes 1000] [--threads 2]

`forward`: a stack of Linears with its weights on the disk, page cache warm, beside the same stack in memory;
all take turns. `map`: a device map of 2 000 modules. `dispatch`: filling an empty model from a safetensors
file onto the CPU, beside reading the file's bytes into memory (accelerate maps the file and reads it later).
`memory`: the highest anonymous memory while a checkpoint is loaded in another type, above what is placed on
the CPU; in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

MB = 1_000_000


def stack(megabytes: float, layers: int) -> Any:
    """That many megabytes of float32 in that many Linears."""
    import torch

    width = int((megabytes * MB / 4 / layers) ** 0.5)
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def empty(megabytes: float, layers: int) -> Any:
    """The same without memory."""
    from nbaccel import init_empty_weights

    with init_empty_weights():
        return stack(megabytes, layers)


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; one untimed round first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            gc.collect()
            start = time.perf_counter()
            kept = run()
            if number:
                times[name].append(time.perf_counter() - start)
            del kept
    return {name: median(taken) for name, taken in times.items()}


def forward(folder: Path, megabytes: float, rounds: int, rows: int) -> dict[str, float]:
    """One forward pass of `rows` rows."""
    import accelerate
    import torch
    from safetensors.torch import save_file

    from nbaccel import load_checkpoint_and_dispatch

    layers = 48
    memory = stack(megabytes, layers).requires_grad_(False)
    path = folder / "stack.safetensors"
    save_file(memory.state_dict(), path)
    ours = load_checkpoint_and_dispatch(empty(megabytes, layers), path, {"": "disk"})
    theirs = accelerate.disk_offload(stack(megabytes, layers), str(folder / f"accelerate-{rows}"))
    x = torch.randn(rows, memory[0].in_features)
    with torch.no_grad():
        # weights mapped where they lie in the file are not always aligned: the last bit may differ
        torch.testing.assert_close(ours(x), memory(x))
        torch.testing.assert_close(theirs(x), memory(x))
        answers = {"in memory": memory, "nbaccel": ours, "accelerate": theirs}
        return in_turns({name: partial(model, x) for name, model in answers.items()}, rounds)


def device_map(rounds: int) -> dict[str, float]:
    """2 000 modules that fit half."""
    import accelerate
    import torch

    from nbaccel import infer_auto_device_map

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2000)))
    limits: dict[Any, Any] = {"cpu": 17 * MB}
    whole: dict[Any, Any] = {"cpu": 100 * MB}
    return in_turns(
        {
            "nbaccel, half fits": lambda: infer_auto_device_map(model, limits),
            "accelerate, half fits": lambda: accelerate.infer_auto_device_map(model, dict(limits)),
            "nbaccel, all fits": lambda: infer_auto_device_map(model, whole),
            "accelerate, all fits": lambda: accelerate.infer_auto_device_map(model, dict(whole)),
        },
        rounds,
    )


def dispatch(folder: Path, megabytes: float, rounds: int) -> dict[str, float]:
    """From a file to a model that can run."""
    import accelerate
    from safetensors.torch import save_file

    from nbaccel import load_checkpoint_and_dispatch

    layers = 60
    path = folder / "large.safetensors"
    whole = stack(megabytes, layers)
    save_file(whole.state_dict(), path, metadata={"format": "pt"})
    del whole

    def read() -> bytes:
        with path.open("rb", buffering=0) as handle:
            return handle.read()

    def ours(place: str) -> Any:
        return load_checkpoint_and_dispatch(empty(megabytes, layers), path, {"": place})

    def theirs() -> Any:
        return accelerate.load_checkpoint_and_dispatch(empty(megabytes, layers), str(path), {"": "cpu"})

    return in_turns(
        {
            "reading the bytes": read,
            "nbaccel, to the CPU": lambda: ours("cpu"),
            "nbaccel, left on the disk": lambda: ours("disk"),
            "accelerate, mapped": theirs,
        },
        rounds,
    )


def anonymous() -> float:
    """Megabytes of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / MB
    return 0.0


def memory(path: str, megabytes: float) -> dict[str, float]:
    """In a fresh process: loads into bfloat16 and looks every two milliseconds."""
    import torch

    from nbaccel import load_checkpoint_and_dispatch

    model = empty(megabytes, 60)
    torch.zeros(1).to(torch.bfloat16)
    before, peak, done = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_checkpoint_and_dispatch(model, path, {"": "cpu"}, dtype=torch.bfloat16)
    done.set()
    watcher.join()
    sizes = [parameter.numel() * 2 / MB for parameter in model.parameters()]
    return {"peak": peak - before, "placed": sum(sizes), "largest tensor": 2 * max(sizes)}


def line(name: str, seconds: float, beside: float, target: str = "") -> str:
    """One line of the report."""
    return f"  {name:<28} {seconds * 1e3:9.2f} ms   {seconds / beside:6.2f}x   {target}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--checkpoint-megabytes", type=float, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", default=None, help="where files are written; default: the temporary folder"
    )
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options.checkpoint_megabytes)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for rows in (1, 16):
            print(
                f"forward, {options.megabytes:.0f} MB of Linears on the disk, {rows} row(s), page cache warm"
            )
            taken = forward(folder, options.megabytes, options.rounds, rows)
            for who, seconds in taken.items():
                print(line(who, seconds, taken["in memory"], "target <= 1.3x" if who == "nbaccel" else ""))
        print("device map of 2 000 modules")
        taken = device_map(options.rounds)
        for who, seconds in taken.items():
            print(
                line(who, seconds, taken["nbaccel, half fits"], "target <= 10 ms" if "nbaccel" in who else "")
            )
        print(f"dispatch of a {options.checkpoint_megabytes:.0f} MB checkpoint")
        taken = dispatch(folder, options.checkpoint_megabytes, max(3, options.rounds // 3))
        for who, seconds in taken.items():
            print(
                line(
                    who, seconds, taken["reading the bytes"], "target <= 1.1x" if "to the CPU" in who else ""
                )
            )
        command = [sys.executable, __file__, "--memory-of", str(folder / "large.safetensors")]
        command += ["--checkpoint-megabytes", str(options.checkpoint_megabytes)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("anonymous memory while loading as bfloat16")
        allowed = found["placed"] + found["largest tensor"] + 50
        print(f"  peak {found['peak']:.0f} MB, placed {found['placed']:.0f} MB   target <= {allowed:.0f} MB")


if __name__ == "__main__":
    main()
