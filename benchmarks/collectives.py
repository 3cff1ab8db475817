"""What a collective costs on two gloo ranks beside raw torch, accelerate and Lightning Fabric, in one run.

    PYTHONPATH=. python benchmarks/collectives.py

Ours check what the ranks bring: free for what fits in a frame, at the first calls of a line and every 32nd
for what does not. accelerate's and Fabric's do not check unless asked.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROUNDS, REPEAT = 12, 20


def _raw_gather(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _raw_gather(v) for k, v in x.items()}
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x)
    return torch.cat(out)


def _raw_reduce(x: Any) -> Any:
    y = x.clone()
    dist.all_reduce(y)
    return y


def _raw_object(x: Any) -> Any:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, x)
    return out


def _rank(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from accelerate import Accelerator as Theirs
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy  # type: ignore[attr-defined]

    from nbaccel.core import Accelerator

    ours = Accelerator(cpu=True)
    theirs = Theirs(cpu=True)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    fabric.launch()
    from accelerate.utils import gather_object

    small, large = torch.ones(16), torch.ones(250_000)
    nested = {f"metric {i}": torch.ones(4) for i in range(6)}
    cases: dict[str, tuple[Any, dict[str, Callable[[Any], Any]]]] = {
        "gather 64 B": (small, {"raw": _raw_gather, "nbaccel": ours.gather, "accelerate": theirs.gather}),
        "gather 6 tensors": (
            nested,
            {"raw": _raw_gather, "nbaccel": ours.gather, "accelerate": theirs.gather},
        ),
        "gather 1 MB": (large, {"raw": _raw_gather, "nbaccel": ours.gather, "accelerate": theirs.gather}),
        "reduce 64 B": (small, {"raw": _raw_reduce, "nbaccel": ours.reduce, "accelerate": theirs.reduce}),
        "reduce 1 MB": (large, {"raw": _raw_reduce, "nbaccel": ours.reduce, "accelerate": theirs.reduce}),
        "gather_object": (
            [{"text": "x" * 50}],
            {"raw": _raw_object, "nbaccel": ours.gather_object, "accelerate": gather_object},
        ),
        "barrier": (
            None,
            {
                "raw": lambda _: dist.barrier(),
                "nbaccel": lambda _: ours.wait_for_everyone(),
                "accelerate": lambda _: theirs.wait_for_everyone(),
                "fabric": lambda _: fabric.barrier(),
            },
        ),
    }
    for name, (value, contenders) in cases.items():
        if "gather" in name and "object" not in name:
            contenders["fabric"] = fabric.all_gather
        elif "reduce" in name:
            contenders["fabric"] = lambda x: fabric.all_reduce(x, reduce_op="sum")
        seen: dict[str, list[float]] = {c: [] for c in contenders}
        for number in range(ROUNDS + 1):
            for contender, call in contenders.items():
                dist.barrier()
                started = time.perf_counter()
                for _ in range(REPEAT):
                    call(value)
                if number:
                    seen[contender].append((time.perf_counter() - started) / REPEAT * 1e6)
        if rank == 0:
            found = {c: statistics.median(values) for c, values in seen.items()}
            shown = [f"{c} {v:,.0f} ({v / found['raw']:.2f}x)" for c, v in found.items()]
            print(f"{name:17} µs:  " + "   ".join(shown), flush=True)
    dist.destroy_process_group()


def main() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    mp.spawn(_rank, args=(store.port,), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
