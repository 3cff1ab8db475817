"""What a training step costs beside plain torch: ours, accelerate's and Lightning Fabric's, in one run.

    python benchmarks/step.py                  microseconds per step, interleaved rounds, one thread
    python benchmarks/step.py --instructions   user-space instructions per step (perf)
    python benchmarks/step.py --large          a 100 M-parameter model

Each contender trains the same tiny model. Rounds of all contenders take turns, so that whatever else the
machine does touches all of them alike; the first decile over rounds of this thread's CPU time is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

warnings.filterwarnings("ignore")

Step = Callable[[], None]
CASES = ("plain", "accumulation", "bf16", "clip", "measured")


def _model(large: bool) -> nn.Module:
    torch.manual_seed(0)
    if large:
        return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4096, 4096), nn.ReLU())))
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def _parts(large: bool) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    model = _model(large)
    width, out = (4096, 4096) if large else (16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return model, optimizer, torch.randn(8, width), torch.randn(8, out)


def raw(case: str, large: bool) -> Step:
    model, optimizer, x, y = _parts(large)
    loss_fn = nn.functional.mse_loss
    if case == "accumulation":
        count = 0

        def accumulate() -> None:
            nonlocal count
            count += 1
            (loss_fn(model(x), y) / 4).backward()  # type: ignore[no-untyped-call]
            if count % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

        return accumulate
    autocast = case == "bf16"
    clip = case == "clip"

    def step() -> None:
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            loss = loss_fn(out.float(), y)
        else:
            loss = loss_fn(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _with_accelerator(accelerator: object, case: str, large: bool) -> Step:
    model, optimizer, x, y = _parts(large)
    acc = accelerator
    model, optimizer = acc.prepare(model, optimizer)  # type: ignore[attr-defined]
    loss_fn = nn.functional.mse_loss
    backward, clip_grad, clip = acc.backward, acc.clip_grad_norm_, case == "clip"  # type: ignore[attr-defined]
    if case == "accumulation":
        accumulate = acc.accumulate  # type: ignore[attr-defined]

        def micro() -> None:
            with accumulate(model):
                backward(loss_fn(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

        return micro

    def step() -> None:
        backward(loss_fn(model(x), y))
        if clip:
            clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(case: str, large: bool) -> Step:
    from nbaccel.core import Accelerator

    return _with_accelerator(
        Accelerator(
            cpu=True,
            gradient_accumulation_steps=4 if case == "accumulation" else 1,
            mixed_precision="bf16" if case == "bf16" else "no",
            measure=case == "measured",
        ),
        case,
        large,
    )


def accelerate(case: str, large: bool) -> Step:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    made = Accelerator(
        cpu=True,
        gradient_accumulation_steps=4 if case == "accumulation" else 1,
        mixed_precision="bf16" if case == "bf16" else "no",
    )
    return _with_accelerator(made, case, large)


def fabric(case: str, large: bool) -> Step:
    from lightning_fabric import Fabric

    made = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if case == "bf16" else "32-true")
    model, optimizer, x, y = _parts(large)
    model, optimizer = made.setup(model, optimizer)
    loss_fn = nn.functional.mse_loss
    count = 0

    def micro() -> None:
        nonlocal count
        count += 1
        last = count % 4 == 0
        with made.no_backward_sync(model, enabled=not last):
            made.backward(loss_fn(model(x), y) / 4)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        made.backward(loss_fn(model(x), y))
        if case == "clip":
            made.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return micro if case == "accumulation" else step


CONTENDERS = {"raw": raw, "nbaccel": ours, "accelerate": accelerate, "fabric": fabric}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        yield


def times(case: str, large: bool, rounds: int, repeat: int) -> dict[str, float]:
    """Microseconds of CPU time per step by contender: the first decile over the rounds."""
    steps: dict[str, Step] = {}
    for name, make in CONTENDERS.items():
        # Raw torch takes no times; accelerate and Fabric have nothing of the kind.
        if case == "measured" and name not in ("raw", "nbaccel"):
            continue
        with _quiet():
            steps[name] = make(case, large)
    for step in steps.values():
        for _ in range(repeat):
            step()
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # The order turns round, so that none always runs after the same other.
        order = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in order:
            step = steps[name]
            # CPU time of this thread: on a busy machine the wall clock mostly times the others.
            started = time.thread_time()
            for _ in range(repeat):
                step()
            seen[name].append((time.thread_time() - started) / repeat * 1e6)
    return {name: statistics.quantiles(values, n=10)[0] for name, values in seen.items()}


def instructions(case: str, name: str) -> float | None:
    """User-space instructions per step: the difference of a long and a short run.

    Counted by perf, else by callgrind (slow: minutes per contender); None with neither.
    """
    child = [sys.executable, __file__, "--child", name, case]

    def by_perf(steps: int) -> float | None:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", *child, str(steps)]
        found = re.search(r"^(\d+),,instructions", _stderr(command), re.MULTILINE)
        return None if found is None else float(found[1])

    def by_callgrind(steps: int) -> float | None:
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *child, str(steps)]
        found = re.search(r"Collected : (\d+)", _stderr(command))
        return None if found is None else float(found[1])

    for count, short, long in ((by_perf, 500, 3500), (by_callgrind, 50, 250)):
        first = count(short)
        second = None if first is None else count(long)
        if first is not None and second is not None:
            return (second - first) / (long - short)
    return None


def _stderr(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "CASE", "STEPS"))
    parser.add_argument("--json", action="store_true", help="one line of JSON per case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        name, case, steps = options.child
        step = CONTENDERS[name](case, False)
        for _ in range(int(steps)):
            step()
        return
    for case in ["plain"] if options.large else options.cases:
        if options.instructions:
            names = [n for n in CONTENDERS if case != "measured" or n in ("raw", "nbaccel")]
            found = {n: instructions(case, n) for n in names}
            unit = "k instructions"
            result = {n: v / 1e3 for n, v in found.items() if v is not None}
        else:
            repeat, rounds = (1, 12) if options.large else (100, options.rounds)
            result, unit = times(case, options.large, rounds, repeat), "µs"
        if not result:
            print(f"{case}: this machine counts no instructions")
            continue
        if options.json:
            print(json.dumps({"case": case, "unit": unit, **result}))
            continue
        base = result["raw"]
        shown = [f"{n} {v:,.1f} ({v - base:+,.1f}, {v / base - 1:+.1%})" for n, v in result.items()]
        print(f"{case:13} {unit}:  " + "   ".join(shown), flush=True)


if __name__ == "__main__":
    main()
