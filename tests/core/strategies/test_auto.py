"""strategy="auto" on real ranks: what the planner chooses for what is prepared, and that it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import Job, TinyLM, Trained, difference, train
from torch import nn

from nbaccel import FSDP, ContextParallel, DeepSpeed
from nbaccel.errors import ConfigError

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20


class Wide(nn.Module):
    """64 MiB of weights in 16 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def whole_copies(job: Job) -> tuple[Trained, str, Any, str]:
    """The training of all strategies' tests, with what was chosen for it and what was printed."""
    import contextlib
    import io

    from nbaccel.core import Accelerator

    said = io.StringIO()
    acc = Accelerator(cpu=True, strategy="auto")
    before = acc.plan
    with contextlib.redirect_stdout(said):
        acc.prepare(nn.Linear(2, 2))
        trained = train(job)
    assert before is None
    return trained, acc.strategy.name, acc.plan, said.getvalue()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_small_model_when_nothing_is_asked_gets_whole_copies_and_no_tracing(
    num_processes: int, alone: tuple[Trained, str]
) -> None:
    ranks = run_ranks(whole_copies, Job(strategy="auto"), num_processes=num_processes)
    for trained, name, plan, _ in ranks:
        assert difference(trained.losses, alone[0].losses) <= 1e-5
        assert name == plan.chosen.spread.name == ("ddp" if num_processes > 1 else "single")
        assert plan.setting.activations.flops == 0
        others = [one for one in plan.candidates if one is not plan.chosen]
        assert all(one.why_not for one in others)
        assert str(plan) == str(ranks[0][2])
        if num_processes > 1:
            assert "not needed: ddp takes" in str(plan)
            assert "ddp: small, so that dividing it would gain nothing" in plan.why()
    assert [said.count("strategy 'auto': ") for *_, said in ranks] == [2, *[0] * (num_processes - 1)]


def limited(room: int) -> None:
    """Gives this process `room` more bytes, and not one beyond: what takes more fails."""
    import ctypes
    import resource
    from pathlib import Path

    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # freed tensors go back to the system at once
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))


def short_of_memory() -> dict[str, Any]:
    """What is chosen where copies do not fit, or cannot be made; each is trained a few steps."""
    import gc

    from nbaccel.core import Accelerator
    from nbaccel.core.offload import init_empty_weights

    found: dict[str, Any] = {}

    def stepped(acc: Accelerator, model: nn.Module, batches: torch.Tensor) -> tuple[str, Any, bool]:
        data = torch.utils.data.TensorDataset(batches)
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        model, optimizer, loader = acc.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        before = [p.to_local().clone() for p in model.parameters()]
        for (batch,) in loader:
            acc.step(model(batch).square().mean(), optimizer)
        after = [p.to_local() for p in model.parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        acc.free_memory()
        return acc.strategy.name, acc.plan, moved

    tokens = torch.randint(5, (8, 4))
    found["kind"] = stepped(Accelerator(cpu=True, strategy=FSDP(sharding="auto")), TinyLM(2), tokens)
    with init_empty_weights():
        empty = TinyLM(2)
    found["empty"] = stepped(Accelerator(cpu=True, strategy="auto"), empty, tokens)
    acc = Accelerator(cpu=True, strategy="auto")
    gc.collect()
    torch.manual_seed(0)
    limited(230 * MIB)
    found["short"] = stepped(acc, Wide(), torch.randn(8, 1024))
    try:
        torch.empty(230 * MIB, dtype=torch.uint8)
        found["limit"] = "was not there"
    except RuntimeError as error:
        found["limit"] = str(error)
    late = Accelerator(cpu=True, strategy="auto")
    model = TinyLM(2)
    late.prepare(torch.optim.SGD(model.parameters()))
    late.prepare(model)
    found["late"] = late.strategy.name, late.plan
    with pytest.raises(ConfigError) as caught:
        Accelerator(cpu=True, strategy=FSDP(sharding="auto", context_parallel=ContextParallel()))
    found["decided twice"] = str(caught.value)
    return found


def test_shards_are_chosen_when_copies_do_not_fit_or_cannot_be_made() -> None:
    ranks = run_ranks(short_of_memory)
    for found in ranks:
        for case in ("kind", "empty", "short"):
            name, plan, moved = found[case]
            assert (name, moved) == ("fsdp", True), (case, str(plan))
            assert plan == ranks[0][case][1], case
        rows = {one.spread.name: one.why_not for one in found["short"][1].candidates}
        assert rows["ddp"].startswith("needs ")
        assert found["short"][1].setting.activations.flops > 0
        assert "memory" in found["limit"]
        kinds = {one.spread.name: one.why_not for one in found["kind"][1].candidates}
        assert kinds["ddp"] == "strategy 'fsdp' was asked for"
        assert "meta device" in found["empty"][1].candidates[0].why_not
        assert found["late"][0] == "ddp"
        assert "before its model" in found["late"][1].candidates[-2].why_not
        assert "context_parallel cannot go with fsdp's sharding='auto'" in found["decided twice"]


def stages() -> dict[str, Any]:
    from nbaccel.core import Accelerator

    found: dict[str, Any] = {}
    for name, options in (
        ("open", DeepSpeed()),
        ("file", DeepSpeed(config={"zero_optimization": {"stage": 2}})),
    ):
        acc = Accelerator(cpu=True, strategy=options)
        model = TinyLM(2)
        model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters()))
        acc.step(model(torch.ones(2, 3, dtype=torch.int64)).square().mean(), optimizer)
        found[name] = acc.strategy.name, acc.plan, model.zero_optimization_stage()
    acc = Accelerator(cpu=True, strategy="deepspeed")
    model = TinyLM(2)
    with pytest.raises(ConfigError) as caught:
        acc.prepare(model, torch.optim.Adafactor(model.parameters()))
    found["refused"] = str(caught.value)
    return found


def test_stage_when_left_open_is_the_planners_or_the_files() -> None:
    pytest.importorskip("deepspeed")
    for found in run_ranks(stages):
        name, plan, stage = found["open"]
        assert name == "deepspeed"
        assert plan.chosen.spread.name == f"zero-{stage}"
        assert found["file"] == ("deepspeed", None, 2)
        assert "no strategy can be chosen" in found["refused"]
        assert "Adafactor cannot go with ZeRO" in found["refused"]


def test_what_the_planner_decides_when_it_is_asked_for_too_is_refused() -> None:
    with pytest.raises(ConfigError, match="cpu_offload cannot go with sharding='auto'"):
        FSDP(sharding="auto", cpu_offload=True)
