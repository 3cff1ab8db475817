"""ZeRO-3 that swaps to a disk: files during training, the numbers of one process, checkpoints; what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from nbaccel.core.async_io import obstacle
from nbaccel.core.plan import size_of
from nbaccel.core.strategies.deepspeed import unfit
from nbaccel.core.world import single
from nbaccel.core.zero.nvme import claim_folder
from nbaccel.core.zero.settings import settings
from nbaccel.errors import ConfigError
from tests.conftest import needs

pytestmark = needs("deepspeed")
on_disk = pytest.mark.usefixtures("async_io")


@pytest.fixture(scope="module")
def async_io() -> None:
    """Not at collection: it imports DeepSpeed and asks a compiler."""
    if missing := obstacle():
        pytest.skip(missing)


@dataclass(kw_only=True)
class Seen:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    """This rank's swap files in the middle of training, by name, with their bytes."""
    rewritten: list[str] = field(default_factory=list)
    """Those that the next step has written again."""
    in_memory: int = 0
    """Numbers that DeepSpeed's float32 copy holds in memory between steps."""
    weights: dict[str, float] = field(default_factory=dict)


def train(strategy: Any, save: str | None = None, load: str | None = None, width: int = 1024) -> Seen:
    """Six steps of AdamW, in two micro-steps weighed by numbers of samples, with clipping."""
    from nbaccel.core import Accelerator

    def swap_files() -> dict[str, os.stat_result]:
        root = Path(getattr(strategy, "nvme_path", None) or "/nonexistent")
        return {str(f.relative_to(root)): f.stat() for f in root.rglob(f"rank{acc.process_index}/*.swp")}

    acc = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=2)
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(
        *(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
        *(nn.Linear(width, width), nn.Linear(width, 4)),
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(48, 16, generator=torch.Generator().manual_seed(5))
    model, optimizer = acc.prepare(model, optimizer)
    seen = Seen()
    if load:
        acc.load_state(load)
    for step in range(3 if load else 0, 6):
        for micro in range(2):
            batch = inputs[8 * step + 4 * micro :][:4]
            share = batch[acc.process_index :: acc.num_processes]
            with acc.accumulate(model):
                loss = model(share).square().sum()
                acc.backward(loss, weight=4 * len(share))
                norm = acc.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                optimizer.zero_grad()
            seen.losses.append(acc.reduce(loss.detach()).item())
            if norm is not None:
                seen.norms.append(float(norm))
        if step == 3:
            before = swap_files()
            seen.files = {name: found.st_size for name, found in before.items()}
        if step == 4:
            after = swap_files()
            seen.rewritten = [
                n for n in before if n in after and after[n].st_mtime_ns > before[n].st_mtime_ns
            ]
        if save and step == 2:
            acc.save_state(save)
    zero = getattr(getattr(model, "optimizer", None), "fp32_partitioned_groups_flat", ())
    seen.in_memory = sum(flat.numel() for flat in zero)
    seen.weights = {name: value.double().sum().item() for name, value in acc.get_state_dict(model).items()}
    return seen


def on_the_host() -> list[Seen]:
    return [train(DeepSpeed(stage=stage, offload_optimizer="cpu"), width=16) for stage in (2, 3)]


def close(one: Seen, other: Seen) -> bool:
    last = other.losses[-len(one.losses) :]
    return (
        one.losses == pytest.approx(last, abs=1e-5)
        and one.norms == pytest.approx(other.norms[-len(one.norms) :], abs=1e-5)
        and one.weights == pytest.approx(other.weights, abs=1e-3)
    )


@on_disk
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_when_everything_is_swapped_to_a_disk_is_that_of_one_process(tmp_path) -> None:
    (alone,) = run_ranks(train, "single", num_processes=1)
    options = DeepSpeed(
        stage=3, offload_optimizer="nvme", offload_param="nvme", nvme_path=str(tmp_path / "swap")
    )
    saved = str(tmp_path / "middle")
    found = run_ranks(train, options, saved, deadline=800)
    for one in found:
        assert close(one, alone)
        moments = {n: s for n, s in one.files.items() if "exp_avg-" in n or "exp_avg_sq-" in n}
        params = {n: s for n, s in one.files.items() if n.endswith("_param.tensor.swp")}
        # two matrices of 2²⁰ numbers, of which each of two ranks has half, in float32
        assert sum(moments.values()) >= 2 * 2 * 2**20 * 2, one.files
        assert sum(params.values()) == 2 * 2**20 * 2, one.files
        assert set(moments) | set(params) <= set(one.rewritten)
        assert one.in_memory < 2**18
    for one in run_ranks(train, options, None, saved, deadline=200):
        assert close(one, alone)
    (moved,) = run_ranks(train, "single", None, saved, num_processes=1)
    assert close(moved, alone)


def test_gradients_when_offloaded_to_the_host_are_weighed() -> None:
    (alone,) = run_ranks(train, "single", None, None, 16, num_processes=1)
    for both in run_ranks(on_the_host):
        for one in both:
            assert close(one, alone)


def configuration(folder: Path | str | None) -> dict[str, Any]:
    place = {"device": "nvme", "buffer_count": 5} | ({} if folder is None else {"nvme_path": str(folder)})
    return {"zero_optimization": {"stage": 3, "sub_group_size": 1000, "offload_optimizer": place}}


MODEL = size_of(nn.Linear(64, 64))


@on_disk
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_folder_when_another_process_swaps_to_it_is_refused(tmp_path) -> None:
    code = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in-use")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another run swaps to"):
            claim_folder(configuration(tmp_path), MODEL, single())
        other.communicate()
    claim_folder(configuration(tmp_path), MODEL, single())


@on_disk
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_folder_when_it_cannot_be_swapped_to_is_refused(tmp_path) -> None:
    with torch.device("meta"):
        enormous = size_of(nn.Linear(10**7, 10**5))
    for folder, size, said in (
        (None, MODEL, "needs one nvme_path"),
        ("/proc/swap", MODEL, "cannot be used"),
        (tmp_path, enormous, r"take about 16000\.\d GB.* would not notice a full disk"),
    ):
        with pytest.raises(ConfigError, match=said):
            claim_folder(configuration(folder), size, single())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            DeepSpeed(stage=2, config={"zero_optimization": {"offload_param": {"device": "nvme"}}}),
            "needs stage 3 of ZeRO, and the stage is 2",
        ),
        (
            DeepSpeed(stage=3, offload_param="nvme", nvme_path="disk", prefetch_bucket_size=100),
            "prefetching parameters cannot go with offload_param='nvme'",
        ),
    ],
)
def test_options_when_they_cannot_go_with_nvme_are_refused(options: DeepSpeed, said: str) -> None:
    assert options.stage != "auto"
    with pytest.raises(ConfigError, match=said):
        settings(
            options,
            stage=options.stage,
            size=MODEL,
            num_processes=2,
            precision="no",
            accumulation=1,
            clipping=None,
        )


def test_adagrad_when_it_would_be_swapped_is_refused() -> None:
    optimizer = torch.optim.Adagrad(nn.Linear(2, 2).parameters())
    options = DeepSpeed(stage=3, offload_optimizer="nvme", nvme_path="disk")
    assert "Adagrad cannot be offloaded to 'nvme'" in unfit([optimizer], options)
    assert not unfit([optimizer], DeepSpeed(stage=3, offload_optimizer="cpu"))
