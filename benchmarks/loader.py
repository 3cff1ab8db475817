"""What a batch costs: nbaccel's loader beside torch's, accelerate's and Lightning Fabric's.

    python benchmarks/loader.py [--quick] [--only batch resume dispatch] [--json FILE]

One thread; the loaders take turns within each round, in changing order, so that the machine's moods meet
all of them. Wall times are medians over rounds, differences and ratios medians of those within a round. CPU time is
the training process's own, the least of all rounds: other processes' load reaches it little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

Make = Callable[[], DataLoader[Any]]
Wrap = Callable[[DataLoader[Any]], Iterable[Any]]
Row = dict[str, Any]


class Samples(Dataset[torch.Tensor]):
    """Ready-made samples, so that reading one costs next to nothing."""

    def __init__(self, total: int) -> None:
        self.samples = list(torch.randn(total, 4).unbind())
        self.reads = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.samples[index]


class Batched(Samples):
    """The same, for a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        samples = self.samples
        return [samples[index] for index in indices]


class Stream(IterableDataset[torch.Tensor]):
    """The same samples, one after another."""

    def __init__(self, total: int) -> None:
        self.samples = list(torch.randn(total, 4).unbind())

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self.samples


class Endless(Dataset[int]):
    """As many samples as one likes; counts those read."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.reads = 0

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> int:
        self.reads += 1
        return index


def wraps() -> dict[str, Wrap]:
    """Each library's way to prepare a DataLoader, in this process."""
    from accelerate import Accelerator
    from lightning_fabric import Fabric

    from nbaccel.core.data import ShardedLoader
    from nbaccel.core.world import join

    world = join()
    accelerator = Accelerator(cpu=True)
    fabric = Fabric(accelerator="cpu", devices=world.size, strategy="ddp" if world.size > 1 else "auto")
    if world.size > 1:
        fabric.launch()
    return {
        "torch": lambda loader: loader,
        "nbaccel": lambda loader: ShardedLoader(loader, world=world, seed=1),
        "accelerate": accelerator.prepare_data_loader,
        "fabric": fabric.setup_dataloaders,
    }


def epoch_costs(loader: Iterable[Any]) -> tuple[float, float]:
    """Microseconds per batch of one pass: on the wall, and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    batches = sum(1 for _ in loader)
    return (time.perf_counter() - wall) / batches * 1e6, (time.process_time() - cpu) / batches * 1e6


def in_turns(loaders: dict[str, Iterable[Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Costs of each loader and round, after one round that is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    names = list(loaders)
    for number in range(rounds + 1):
        random.Random(number).shuffle(names)
        for name in names:
            costs = epoch_costs(loaders[name])
            if number:
                times[name].append(costs)
    return times


def rows_of(case: str, times: dict[str, list[tuple[float, float]]], against: str = "torch") -> list[Row]:
    """Medians, and the comparison with `against` within each round."""
    rows = []
    for name, values in times.items():
        pairs = [(mine[0], base[0]) for mine, base in zip(values, times[against], strict=True)]
        cpu = min(cost[1] for cost in values)
        base_cpu = min(cost[1] for cost in times[against])
        rows.append(
            {
                "case": case,
                "loader": name,
                "us_per_batch": statistics.median(mine for mine, _ in pairs),
                "over_us": statistics.median(mine - base for mine, base in pairs),
                "ratio": statistics.median(mine / base for mine, base in pairs),
                "cpu_us": cpu,
                "cpu_over_us": cpu - base_cpu,
                "cpu_ratio": cpu / base_cpu,
            }
        )
    return rows


def measure_batch(rounds: int) -> list[Row]:
    """One process: what a batch costs beyond reading its samples."""
    samples, batched = Samples(4096), Batched(4096)
    tensors = TensorDataset(torch.randn(65536, 16), torch.arange(65536))
    large, stream = Endless(1 << 20), Stream(32768)
    cases: dict[str, Make] = {
        "IterableDataset, batch 8": lambda: DataLoader(stream, 8),
        "samples, batch 8": lambda: DataLoader(samples, 8),
        "samples, batch 8, shuffled": lambda: DataLoader(samples, 8, shuffle=True),
        "__getitems__, batch 32, shuffled": lambda: DataLoader(batched, 32, shuffle=True),
        "1 M samples, batch 64, shuffled": lambda: DataLoader(large, 64, shuffle=True),
        "samples, batch 8, 2 workers": lambda: DataLoader(samples, 8, num_workers=2, persistent_workers=True),
        "TensorDataset, batch 64": lambda: DataLoader(tensors, 64),
        "TensorDataset, batch 64, shuffled": lambda: DataLoader(tensors, 64, shuffle=True),
        "TensorDataset, batch 8, shuffled": lambda: DataLoader(tensors, 8, shuffle=True),
    }
    rows: list[Row] = []
    for case, make in cases.items():
        times = in_turns({name: wrap(make()) for name, wrap in wraps().items()}, _rounds_for(case, rounds))
        rows += rows_of(case, times)
    return rows


def _rounds_for(case: str, rounds: int) -> int:
    return max(2, rounds // 4) if case.startswith("1 M") or "workers" in case else rounds


def measure_resume(rounds: int) -> list[Row]:
    """Milliseconds until the first batch after going on at batch 1 000 000, and samples read for it."""
    from accelerate import Accelerator, skip_first_batches

    from nbaccel.core.data import ShardedLoader
    from nbaccel.core.world import join

    world, batches = join(), 1_000_000
    accelerator = Accelerator(cpu=True)

    def ours(dataset: Endless, shuffle: bool) -> Iterable[Any]:
        loader = ShardedLoader(DataLoader(dataset, 1, shuffle=shuffle), world=world, seed=1)
        loader.load_state_dict(loader.state_dict() | {"samples": batches, "cursor": batches})
        return loader

    def theirs(dataset: Endless, shuffle: bool) -> Iterable[Any]:
        loader = accelerator.prepare_data_loader(DataLoader(dataset, 1, shuffle=shuffle))
        return skip_first_batches(loader, batches)  # type: ignore[no-any-return]

    def by_hand(dataset: Endless, shuffle: bool) -> Iterable[Any]:
        return itertools.islice(DataLoader(dataset, 1, shuffle=shuffle), batches, None)

    rows: list[Row] = []
    for shuffle in (False, True):
        # By hand takes half a minute, and shuffled twice that.
        contenders = {"nbaccel": ours, "accelerate": theirs} | ({} if shuffle else {"torch": by_hand})
        for name, resume in contenders.items():
            times, cpu, reads = [], [], 0
            for _ in range({"torch": 1, "accelerate": 3}.get(name, rounds)):
                dataset = Endless(2 * batches)
                started, used = time.perf_counter(), time.process_time()
                next(iter(resume(dataset, shuffle)))
                times.append((time.perf_counter() - started) * 1e3)
                cpu.append((time.process_time() - used) * 1e3)
                reads = dataset.reads
            case = f"resume at batch 1 000 000{', shuffled' if shuffle else ''}"
            row = {"case": case, "loader": name, "samples_read": reads}
            rows.append(row | {"ms": statistics.median(times), "cpu_ms": min(cpu)})
    return rows


def measure_dispatch(rounds: int) -> list[Row]:
    """Two ranks: rank 0 reads for both, beside every rank reading its own share."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        mp.spawn(_dispatch_rank, args=(folder, rounds, port), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        return json.loads((Path(folder) / "rows.json").read_text())  # type: ignore[no-any-return]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dispatch_rank(rank: int, folder: str, rounds: int, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch.distributed as dist
    from accelerate import Accelerator, DataLoaderConfiguration

    from nbaccel.core.data import ShardedLoader
    from nbaccel.core.world import join

    world = join()
    samples = Samples(4096)
    tensors = TensorDataset(torch.randn(16384, 16), torch.arange(16384))
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    cases: dict[str, Make] = {
        "dispatch, samples, batch 8": lambda: DataLoader(samples, 8),
        "dispatch, TensorDataset, batch 64": lambda: DataLoader(tensors, 64),
    }
    rows: list[Row] = []
    for case, make in cases.items():
        loaders: dict[str, Iterable[Any]] = {
            "nbaccel, each rank reads": ShardedLoader(make(), world=world, seed=1),
            "nbaccel": ShardedLoader(make(), world=world, seed=1, dispatch=True),
            "accelerate": accelerator.prepare_data_loader(make()),
            "torch, each rank reads": DataLoader(
                make().dataset,
                make().batch_size,
                sampler=torch.utils.data.DistributedSampler(make().dataset, shuffle=False),
            ),
        }
        rows += rows_of(case, in_turns(loaders, rounds), "torch, each rank reads")
        dist.barrier()
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def show(rows: list[Row]) -> None:
    """Print the rows, one case after the other."""
    for case, group in itertools.groupby(rows, key=lambda row: row["case"]):
        print(f"\n{case}")
        for row in group:
            if "ms" in row:
                print(
                    f"  {row['loader']:26} {row['ms']:10.2f} ms   CPU {row['cpu_ms']:10.2f} ms   "
                    f"{row['samples_read']} samples read"
                )
            else:
                print(
                    f"  {row['loader']:26} {row['us_per_batch']:9.1f} µs/batch  "
                    f"{row['over_us']:+8.1f} µs  x{row['ratio']:<6.2f}  "
                    f"CPU {row['cpu_us']:8.1f} {row['cpu_over_us']:+8.1f} µs  x{row['cpu_ratio']:.2f}"
                )


def main() -> int:
    """Measure what was asked, print it and keep it where asked."""
    parts = {"batch": measure_batch, "resume": measure_resume, "dispatch": measure_dispatch}
    parser = argparse.ArgumentParser(description="Time loaders beside each other.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", nargs="+", choices=sorted(parts), default=list(parts))
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds = 7 if options.quick else 25
    rows = [row for part in options.only for row in parts[part](rounds)]
    print(f"torch {torch.__version__}, one thread, {rounds} rounds")
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
