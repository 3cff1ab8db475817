"""What a training step costs beside plain torch: ours, accelerate's and Lightning Fabric's, in one run.

    python benchmarks/step.py                  microseconds per step, interleaved rounds, one thread
    python benchmarks/step.py --instructions   instructions per step, by callgrind: whatever else the machine does
    python benchmarks/step.py --large          a 100 M-parameter model: wall time, ratios within rounds

Each contender trains the same tiny model. Rounds of all contenders take turns, so that whatever else the
machine does touches all of them alike. Of the tiny model the first decile over rounds of this thread's CPU
time is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from instructions import Counter, can_count, counts_of_child

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
            loss = loss_fn(model(x), y) / 4
            loss.backward()  # type: ignore[no-untyped-call]
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
                loss = loss_fn(model(x), y)
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()

        return micro

    def step() -> None:
        loss = loss_fn(model(x), y)  # lives as long as in the raw loop: its end costs something
        backward(loss)
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
            loss = loss_fn(model(x), y) / 4
            made.backward(loss)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        loss = loss_fn(model(x), y)
        made.backward(loss)
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


def samples(case: str, large: bool, rounds: int, repeat: int) -> dict[str, list[float]]:
    """Microseconds per step by contender and round: of this thread's CPU, or of wall time for the large model."""
    steps: dict[str, Step] = {}
    for name in _contenders(case):
        with _quiet():
            steps[name] = CONTENDERS[name](case, large)
    for step in steps.values():
        for _ in range(repeat):
            step()
    # CPU time: on a busy machine the wall clock mostly times the others, where a step is short.
    clock = time.perf_counter if large else time.thread_time
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # The order turns round, so that none always runs after the same other.
        order = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in order:
            step = steps[name]
            started = clock()
            for _ in range(repeat):
                step()
            seen[name].append((clock() - started) / repeat * 1e6)
    return seen


def tiny(case: str, rounds: int) -> dict[str, float]:
    """The first decile over rounds of 100 steps."""
    seen = samples(case, False, rounds, 100)
    return {name: statistics.quantiles(values, n=10)[0] for name, values in seen.items()}


def large(rounds: int) -> str:
    """Each contender's median, and the median of its ratios to raw torch in the same round with its quartiles."""
    seen = samples("plain", True, rounds, 1)
    shown = []
    for name, values in seen.items():
        ratios = [mine / base for mine, base in zip(values, seen["raw"], strict=True)]
        low, middle, high = (f"{quartile - 1:+.1%}" for quartile in statistics.quantiles(ratios, n=4))
        shown.append(f"{name} {statistics.median(values) / 1e3:,.0f} ms ({middle}; {low} to {high})")
    return "   ".join(shown)


def instructions(cases: Sequence[str], repeat: int = 40) -> dict[str, dict[str, float]]:
    """User-space instructions per step by case and contender, counted by callgrind."""
    arguments = ["--child", str(repeat), *cases]
    found: dict[str, dict[str, float]] = {}
    for name, count in counts_of_child(__file__, arguments, repeat).items():
        case, contender = name.split(" ")
        found.setdefault(case, {})[contender] = count
    return found


def _contenders(case: str) -> list[str]:
    # Raw torch takes no times; accelerate and Fabric have nothing of the kind.
    return [name for name in CONTENDERS if case != "measured" or name in ("raw", "nbaccel")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--child", nargs="+", metavar="REPEAT CASE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        repeat, *cases = options.child
        with _quiet():
            steps = {f"{case} {n}": CONTENDERS[n](case, False) for case in cases for n in _contenders(case)}
        Counter().per_step(steps, int(repeat))
        return
    if options.instructions and not can_count():
        print("instructions are counted by callgrind on x86-64, which this machine has not")
        return
    if options.large:
        print(f"100 M parameters:  {large(options.rounds or 25)}")
        return
    counted = instructions(options.cases) if options.instructions else {}
    for case in options.cases:
        if options.instructions:
            result, unit = {name: count / 1e3 for name, count in counted[case].items()}, "k instructions"
        else:
            result, unit = tiny(case, options.rounds or 40), "µs"
        base = result["raw"]
        shown = [f"{n} {v:,.1f} ({v - base:+,.1f}, {v / base - 1:+.1%})" for n, v in result.items()]
        print(f"{case:13} {unit}:  " + "   ".join(shown), flush=True)


if __name__ == "__main__":
    main()
