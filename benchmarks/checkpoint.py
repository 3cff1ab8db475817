"""Saving and loading one training state: nbaccel beside accelerate, Lightning Fabric, torch.save and DCP.

    python benchmarks/checkpoint.py [--ranks 1 2] [--megabytes 64] [--rounds 7] [--folder DIR]

All contenders take turns in one run, in a new order each round, with one thread per rank. `blocks` is how
long training waits for a save in the background, from the second one on, beside copying the state into
warm buffers. Everyone saves the parameters and the AdamW state of the same model; nbaccel and DCP sync
their files to disk, torch.save, accelerate and Fabric do not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Contender = dict[str, Callable[[], Any]]


def build(megabytes: float) -> tuple[Any, Any]:
    """A model of that many megabytes of float32 parameters in 24 layers, and AdamW after one step."""
    import torch

    width = max(8, int((megabytes * 1e6 / 4 / 24) ** 0.5))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(24)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def ours(folder: Path, megabytes: float) -> Contender:
    """nbaccel, at once and in the background."""
    from nbaccel.core.checkpoint import Checkpoints, Contents, ModelState, OptimizerState, Sharded, Stateful
    from nbaccel.core.world import join

    model, optimizer = build(megabytes)
    at_once, behind = Checkpoints(world=join()), Checkpoints(world=join())
    things: dict[str, Sharded] = {"model": ModelState(model), "optimizer": OptimizerState(optimizer, [model])}
    contents: Contents[Sharded, Stateful] = Contents(sharded=things)
    return {
        "save": lambda: at_once.save(folder / "c", contents, step=1),
        "load": lambda: at_once.load(folder / "c", contents),
        "load, unverified": lambda: at_once.load(folder / "c", contents, verify=False),
        "blocks": lambda: behind.save(folder / "b", contents, step=1, asynchronous=True),
        "wait": behind.wait,
    }


def torch_save(folder: Path, megabytes: float) -> Contender:
    """torch.save on rank 0, torch.load on all."""
    import torch
    import torch.distributed as dist

    model, optimizer = build(megabytes)

    def save() -> None:
        if dist.get_rank() == 0:
            torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, folder / "c.pt")
        dist.barrier()

    def load() -> None:
        state = torch.load(folder / "c.pt", weights_only=True)
        model.load_state_dict(state["m"])
        optimizer.load_state_dict(state["o"])

    return {"save": save, "load": load}


def dcp(folder: Path, megabytes: float) -> Contender:
    """torch.distributed.checkpoint as its documentation uses it."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = build(megabytes)
    group = dist.new_group(backend="gloo")
    stager = DefaultStager(StagingOptions(False, False, False, False))
    pending: list[Any] = []

    def state() -> dict[str, Any]:
        m, o = get_state_dict(model, optimizer)
        return {"m": m, "o": o}

    def load() -> None:
        target = state()
        checkpoint.load(target, checkpoint_id=folder / "c")  # type: ignore[attr-defined]
        set_state_dict(model, optimizer, model_state_dict=target["m"], optim_state_dict=target["o"])

    def background() -> None:
        pending.append(
            checkpoint.async_save(  # type: ignore[attr-defined]
                state(), checkpoint_id=folder / "b", process_group=group, async_stager=stager
            )
        )

    def wait() -> None:
        while pending:
            result = pending.pop()
            getattr(result, "upload_completion", result).result()

    save = lambda: checkpoint.save(state(), checkpoint_id=folder / "c")  # type: ignore[attr-defined]  # noqa: E731
    return {"save": save, "load": load, "blocks": background, "wait": wait}


def accelerate(folder: Path, megabytes: float) -> Contender:
    """accelerate's save_state and load_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*build(megabytes))
    return {
        "save": lambda: accelerator.save_state(str(folder / "c")),
        "load": lambda: accelerator.load_state(str(folder / "c")),
    }


def fabric(folder: Path, megabytes: float) -> Contender:
    """Lightning Fabric's save and load."""
    import torch.distributed as dist
    from lightning_fabric import Fabric

    made = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    made.launch()
    model, optimizer = made.setup(*build(megabytes))
    state = {"m": model, "o": optimizer}
    return {"save": lambda: made.save(folder / "c", state), "load": lambda: made.load(folder / "c", state)}


def warm_copy(folder: Path, megabytes: float) -> Contender:
    """Copying parameters and optimizer state into buffers that have been written before."""
    model, optimizer = build(megabytes)
    tensors = [*model.state_dict().values()]
    tensors += [value for values in optimizer.state.values() for value in values.values()]
    buffers = [tensor.clone() for tensor in tensors]

    def copy() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    return {"blocks": copy}


CONTENDERS: dict[str, Callable[[Path, float], Contender]] = {
    "nbaccel": ours,
    "torch.save": torch_save,
    "DCP": dcp,
    "accelerate": accelerate,
    "Fabric": fabric,
    "copy into warm buffers": warm_copy,
}
WHAT = ("save", "load", "load, unverified", "blocks")


def measure(folder: Path, megabytes: float, rounds: int) -> None:
    """One rank's part; rank 0 prints the medians over the rounds of the slowest rank as JSON."""
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # DCP says at each save that it overwrites
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {}
    for name, make in CONTENDERS.items():
        place = folder / name.split()[0]
        place.mkdir(exist_ok=True)
        made[name] = make(place, megabytes)
    turns = [(name, what) for what in WHAT for name in made if what in made[name]]
    samples: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    order = random.Random(0)
    for number in range(rounds + 1):
        saves_first = sorted(order.sample(turns, len(turns)), key=lambda turn: turn[1].startswith("load"))
        for name, what in saves_first:
            dist.barrier()
            start = time.perf_counter()
            made[name][what]()
            seconds = torch.tensor(time.perf_counter() - start)
            made[name].get("wait", lambda: None)()
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if number:  # the first round warms everybody up
                samples[name, what].append(seconds.item())
    made["nbaccel"]["wait"]()
    if dist.get_rank() == 0:
        print(json.dumps([[*turn, values] for turn, values in samples.items()]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def table(ranks: int, megabytes: float, samples: list[tuple[str, str, list[float]]]) -> None:
    """Medians in milliseconds, and the ratio to raw torch."""
    medians = {(name, what): median(values) for name, what, values in samples}
    base = {"save": "DCP", "load": "DCP", "load, unverified": "DCP", "blocks": "copy into warm buffers"}
    print(f"\n{ranks} rank(s), {3 * megabytes:g} MB of state; ms (median, slowest rank)")
    for what in WHAT:
        reference = medians[base[what], "load" if what == "load, unverified" else what]
        print(f"  {what}")
        for name in CONTENDERS:
            if (name, what) in medians:
                value = medians[name, what]
                ratio = f"{value / reference:6.2f}x {base[what]}"
                print(f"    {name:24} {value * 1e3:9.1f}   {ratio}")


def main() -> None:
    """Runs the ranks of each size with torchrun and prints their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--megabytes", type=float, default=64, help="of parameters; AdamW makes it three times"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.folder, options.megabytes, options.rounds)
        return
    for ranks in options.ranks:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--inside", "--folder", str(folder)]
        command += ["--megabytes", str(options.megabytes), "--rounds", str(options.rounds)]
        try:
            run = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        finally:
            shutil.rmtree(folder)
        line = next(line for line in run.stdout.splitlines() if line.startswith("[["))
        table(ranks, options.megabytes, json.loads(line))


if __name__ == "__main__":
    main()
