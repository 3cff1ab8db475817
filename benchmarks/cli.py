"""How soon the command answers, and how soon a script's first line comes, beside torchrun.

    python benchmarks/cli.py [--rounds 5] [--ranks 1 2 4 8] --out build/bench

Every figure is a cold start: a fresh process each time, nothing kept warm. The two launchers take turns within each
round, so that the machine's moods meet both; figures are medians. The script imports torch and prints, as training
scripts do; `step` is the first synchronised DistributedDataParallel step, `end` the command's own end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import torch
print("first line", flush=True)
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
model(torch.ones(4, 8)).sum().backward()
print("first step", flush=True)
dist.barrier()
dist.destroy_process_group()
"""
HELP_TARGET = 0.25
"""Seconds in which `nbaccel --help` must be there."""

Figures = dict[str, list[float]]


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Time the command line beside torchrun.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, required=True, help="folder for cli.json and cli.md")
    options = parser.parse_args()
    samples: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        for _ in range(options.rounds):
            samples.setdefault("help", []).append(_time_help())
            for ranks in options.ranks:
                for name, command in _commands(ranks, script).items():
                    for what, seconds in _time_script(command).items():
                        samples.setdefault(f"{name} {ranks} {what}", []).append(seconds)
    text = _table(samples, options.ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cli.json").write_text(json.dumps(samples, indent=1))
    (options.out / "cli.md").write_text(text)
    print(text)
    return 0


def _commands(ranks: int, script: Path) -> dict[str, list[str]]:
    ours = ["-m", "nbaccel", "launch", "--config", "none", "--no-folder", "--device", "cpu", "-n", str(ranks)]
    theirs = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return {
        "nbaccel": [sys.executable, *ours, str(script)],
        "torchrun": [sys.executable, *theirs, str(script)],
    }


def _time_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nbaccel", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _time_script(command: list[str]) -> dict[str, float]:
    """Seconds from the command's start to the script's first line, its first step, and the command's end."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                for words, what in (("first line", "line"), ("first step", "step")):
                    if words in line:
                        found.setdefault(what, time.perf_counter() - start)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{command} left with {process.returncode}:\n{errors.read()}")
    return {**found, "end": time.perf_counter() - start}


def _table(samples: Figures, ranks: list[int]) -> str:
    took = statistics.median(samples["help"])
    lines = [
        f"`nbaccel --help`: {took:.2f} s (target {HELP_TARGET} s); median of {len(samples['help'])}, cold",
        "",
        "| ranks | first line: nbaccel | torchrun | ratio | DDP step: nbaccel | torchrun | end: nbaccel | torchrun |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in ranks:
        figures = {
            (name, what): statistics.median(samples[f"{name} {count} {what}"])
            for name in ("nbaccel", "torchrun")
            for what in ("line", "step", "end")
        }
        ratio = figures["nbaccel", "line"] / figures["torchrun", "line"]
        pairs = [
            f"{figures[name, what]:.2f} s"
            for what in ("line", "step", "end")
            for name in ("nbaccel", "torchrun")
        ]
        lines.append(f"| {count} | {pairs[0]} | {pairs[1]} | {ratio:.2f} | {' | '.join(pairs[2:])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
