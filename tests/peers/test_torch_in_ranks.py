"""Plain torch inside ranks: DDP, compile, DataLoader workers, children, what torchrun's environment says."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from nbaccel import notebook_launcher

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("clean")]


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Five steps of SGD; the loss of each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_ddp() -> tuple[list[float], nn.Module]:
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = data()
    wrapped = DistributedDataParallel(model(seed=rank))  # rank 0's weights win
    losses = torch.tensor(train(wrapped, x[rank::size], y[rank::size]))
    dist.all_reduce(losses)
    dist.destroy_process_group()
    return (losses / size).tolist(), wrapped


def test_ddp_losses_equal_one_process_when_each_rank_has_its_share() -> None:
    alone = model(seed=0)
    expected = train(alone, *data())
    (losses, first), (_, second) = notebook_launcher(train_ddp, num_processes=2)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert type(first) is nn.Sequential  # came back without its wrapper
    for one, other, reference in zip(
        first.parameters(), second.parameters(), alone.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-6)


def environment() -> dict[str, Any]:
    code = "import os, json; print(json.dumps({k: os.environ.get(k) for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}))"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    dist.init_process_group("gloo", init_method="env://")
    found = {
        "child": child.stdout.strip(),
        "elastic": dist.is_torchelastic_launched(),
        "rank": dist.get_rank(),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "master": os.environ["MASTER_ADDR"],
        "threads": torch.get_num_threads(),
    }
    dist.barrier()
    return found


def test_ranks_look_like_torchrun_to_torch_and_to_a_subprocess() -> None:
    values = notebook_launcher(environment, num_processes=2)
    for rank, found in enumerate(values):
        assert found["child"] == f'{{"RANK": "{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": "{rank}"}}'
        assert found["elastic"] is True
        assert (found["rank"], found["local_rank"], found["master"]) == (rank, rank, "127.0.0.1")
        assert found["threads"] >= 1


def own_address(port: str) -> int:
    """What tutorials do: the address in the code."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", port
    rank = int(os.environ["RANK"])
    total = 0
    for _ in range(2):
        dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
        value = torch.ones(1)
        dist.all_reduce(value)
        total += int(value)
        dist.destroy_process_group()
    return total


def test_tutorial_code_that_sets_its_own_master_port_works_when_it_inits_twice() -> None:
    assert notebook_launcher(own_address, args=("12355",), num_processes=2) == [4, 4]


def compiled_steps() -> list[float]:
    dist.init_process_group()
    wrapped = torch.compile(DistributedDataParallel(model(seed=0)))
    x, y = data()
    rank = dist.get_rank()
    return train(wrapped, x[rank::2], y[rank::2])


@pytest.mark.slow
def test_compiled_ddp_gives_eager_losses_when_trained_in_ranks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data()

    def eager() -> list[float]:
        dist.init_process_group()
        wrapped = DistributedDataParallel(model(seed=0))
        rank = dist.get_rank()
        return train(wrapped, x[rank::2], y[rank::2])

    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    expected = notebook_launcher(eager, num_processes=2)
    for _ in range(2):  # the second one finds the code of the first
        values = notebook_launcher(compiled_steps, num_processes=2, env=env)
        for losses, reference in zip(values, expected, strict=True):
            assert losses == pytest.approx(reference, rel=1e-4)


class Numbers(Dataset[torch.Tensor]):
    """0 … n-1, and which process read each."""

    def __init__(self, n: int) -> None:
        self.values = torch.arange(n)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([self.values[index], torch.tensor(os.getpid())])


def read(context: str | None, epochs: int) -> tuple[list[int], set[int]]:
    dist.init_process_group()
    dataset = Numbers(16)
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=1,
        sampler=DistributedSampler(dataset, shuffle=False),
        multiprocessing_context=context,
        timeout=60,
    )
    seen, pids = [], set()
    for _ in range(epochs):
        for batch in loader:
            seen += batch[:, 0].tolist()
            pids |= set(batch[:, 1].tolist())
    assert os.getpid() not in pids
    return seen, pids


# A worker that is not forked from its rank imports torch anew: one pass of one rank is enough. None is one of these,
# by Python's version.
@pytest.mark.parametrize(
    ("context", "epochs", "ranks"), [("fork", 2, 2), ("forkserver", 1, 1), ("spawn", 1, 1)]
)
def test_loader_workers_read_every_sample_once_when_started_in_ranks(
    context: str | None, epochs: int, ranks: int
) -> None:
    values = notebook_launcher(read, args=(context, epochs), num_processes=ranks)
    assert [seen for seen, _ in values] == [[*range(rank, 16, ranks)] * epochs for rank in range(ranks)]
    assert (
        len(set().union(*(pids for _, pids in values))) == ranks * epochs
    )  # a worker for each rank and pass


def square(value: int, queue: Any) -> None:
    queue.put((value * value, os.environ["RANK"]))


def with_children(method: str, values: list[int]) -> list[tuple[int, str]]:
    context = torch.multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    children = [context.Process(target=square, args=(value, queue)) for value in values]
    for child in children:
        child.start()
    found = sorted(queue.get() for _ in children)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    return found


@pytest.mark.parametrize(("method", "values", "ranks"), [("fork", [2, 3], 2), ("spawn", [2], 1)])
def test_multiprocessing_children_of_a_rank_answer(method: str, values: list[int], ranks: int) -> None:
    found = notebook_launcher(with_children, args=(method, values), num_processes=ranks)
    assert found == [[(value * value, str(rank)) for value in values] for rank in range(ranks)]


def spawn_in_rank() -> list[Any]:
    pool = multiprocessing.get_context("fork").Pool(2)
    try:
        return pool.map_async(abs, [-1, -2, -3]).get(30)
    finally:
        pool.terminate()
        pool.join()


def test_pool_of_a_rank_maps() -> None:
    assert notebook_launcher(spawn_in_rank, num_processes=2) == [[1, 2, 3]] * 2


def heavy_threads() -> float:
    torch.set_num_threads(2)
    x = torch.ones(512, 512)
    return float((x @ x).sum())


def test_threaded_matmul_in_ranks_when_the_parent_did_one_first() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.ones(512, 512)
        expected = float((x @ x).sum())
        assert notebook_launcher(heavy_threads, num_processes=2) == [expected] * 2
    finally:
        torch.set_num_threads(threads)
