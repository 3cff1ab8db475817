"""The planner chooses the fastest way that fits, and says why not of the others."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch import nn

import nbaccel
from nbaccel import FSDP, DeepSpeed, TensorParallel
from nbaccel.core.plan import Setting, choose, machine_for, size_of, trace_step
from nbaccel.errors import ConfigError

GIB = 2**30


def planned(device_gib: float, *, num_processes: int = 8, host_gib: float = 1000, width: int = 8192):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(12)))
    machine = machine_for(
        "NVIDIA A100-SXM4-80GB",
        device_type="cuda",
        device_bytes=int(device_gib * GIB),
        host_bytes=int(host_gib * GIB),
    )
    seen = trace_step(model, torch.empty(64, width, device="meta"))
    setting = Setting(num_processes=num_processes, activations=seen, device_type="cuda")
    return choose(size_of(model), setting, machine, refuse=lambda spread: "")


def test_less_memory_chooses_what_takes_less():
    chosen = [planned(room).chosen for room in (24, 4, 2)]  # the whole state is 12 GiB
    totals = [one.memory.total for one in chosen]
    assert totals == sorted(totals, reverse=True)
    assert [total < 0.92 * room * GIB for total, room in zip(totals, (24, 4, 2), strict=True)] == [True] * 3
    assert [one.spread.name for one in chosen] == ["fsdp grad op", "tensor parallel 8", "fsdp offload"]
    times = [one.seconds_per_batch for one in chosen]
    assert times == sorted(times)


def test_strategy_of_a_plan_is_what_an_accelerator_takes():
    asked = {one.spread.name: one.spread.strategy for one in planned(24).candidates}
    assert asked["ddp"] == "ddp"
    assert asked["zero-2"] == DeepSpeed(stage=2)
    assert asked["zero-3 offload"] == DeepSpeed(stage=3, offload_optimizer="cpu", offload_param="cpu")
    assert asked["fsdp grad op"] == FSDP(sharding="shard_grad_op")
    assert asked["fsdp offload"] == FSDP(cpu_offload=True)
    assert asked["tensor parallel 4"] == TensorParallel(size=4)
    assert planned(24).strategy == asked["fsdp grad op"]


def test_nothing_fits_is_said_with_the_least():
    plan = planned(0.1)
    with pytest.raises(ConfigError, match="nothing fits: fsdp offload takes least"):
        _ = plan.strategy
    assert plan.chosen is None
    assert all("needs" in one.why_not for one in plan.candidates)
    assert "nothing fits" in plan.why()
    assert str(plan).count("needs") >= len(plan.candidates)


def test_offload_is_refused_when_the_host_cannot_hold_it():
    plan = planned(2, host_gib=1)
    offloaded = [one for one in plan.candidates if one.spread.offload]
    assert offloaded
    assert all("the host's" in one.why_not for one in offloaded)


def test_shares_are_those_of_the_paper_when_strategies_shard():
    rows = {one.spread.name: one.memory for one in planned(24).candidates}
    whole = 12 * (8192 * 8192 + 8192) * 4
    ddp, zero1, fsdp = rows["ddp"], rows["zero-1"], rows["fsdp"]
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (whole, whole, 2 * whole)
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (whole + whole // 8, whole, whole // 4)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (whole // 8, whole // 8, whole // 4)


def test_trace_of_a_deep_model_is_extended_from_a_few_blocks():
    def made(depth: int) -> nn.Module:
        with torch.device("meta"):
            blocks = [nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(depth)]
            return nn.Sequential(nn.Linear(8, 32), nn.Sequential(*blocks))

    batch = torch.empty(16, 8)
    shallow, deep, deeper = (trace_step(made(depth), batch) for depth in (8, 9, 40))
    each = deep.flops - shallow.flops  # eight blocks are traced whole, nine from two and four
    assert each == 6 * 16 * (32 * 64) * 2
    assert deeper.flops == deep.flops + 31 * each
    assert deeper.peak - deep.peak == 31 * 4 * 16 * (64 + 32)  # what tanh and the next layer keep


def test_traced_activations_are_what_backward_keeps():
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1))
    seen = trace_step(model, torch.empty(50, 100), loss=lambda m, x: m(x).mean())
    assert 4 * 50 * 100 * 2 <= seen.peak <= 4 * (50 * 100 * 3 + 100 * 100 + 200)
    assert seen.flops == 2 * 50 * (100 * 100 * 2 + 100 * 3)
    assert [p.grad for p in model.parameters()] == [None] * 4


class Rotated(nn.Module):
    """Makes its cosines in the first call, and keeps what it computed last, as an auxiliary loss is kept."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.cos = self.last = None
        self.by_length = {}

    def forward(self, x):
        if self.cos is None:
            self.cos = self.by_length[len(x)] = torch.cos(torch.arange(4.0))
        self.last = self.layer(x) * self.cos
        return self.last.mean()


def test_traced_model_computes_with_numbers_afterwards():
    model = Rotated()
    nbaccel.plan(model, batch=torch.empty(2, 4), num_processes=2)
    assert (model.cos, model.last, model.by_length) == (None, None, {})
    assert model(torch.ones(2, 4)).item() == pytest.approx(
        model.layer(torch.ones(2, 4)).mul(torch.cos(torch.arange(4.0))).mean().item()
    )


class Routed(nn.Module):
    """A mixture of experts, whose tokens are counted."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen = x.sum(-1) > 0
        return sum(expert(x[chosen == number]).sum() for number, expert in enumerate(self.experts))


def test_what_cannot_be_traced_is_planned_by_its_states_and_says_why(capfd):
    plan = nbaccel.plan(Routed(), batch=torch.ones(2, 4), num_processes=2)
    assert plan.chosen is not None
    (note,) = plan.notes
    assert "Routed cannot be traced: what it computes depends on numbers (aten.nonzero.default)" in note
    assert str(plan).endswith(note)
    assert "RuntimeError: " in nbaccel.plan(nn.Linear(3, 4), batch=torch.ones(2, 5), num_processes=2).notes[0]
    for frozen in (nn.ReLU(), nn.Linear(5, 5).requires_grad_(False)):
        assert "needs a gradient" in nbaccel.plan(frozen, batch=torch.ones(2, 5), num_processes=2).notes[0]
    assert "Traceback" not in capfd.readouterr().err, "what torch logs is in the note"


def test_batch_that_needs_a_gradient_is_traced_with_it():
    from torch.utils.checkpoint import checkpoint

    class Recomputed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True).mean()

    model = Recomputed(nn.Linear(4, 4), nn.Tanh())
    plan = nbaccel.plan(model, batch=torch.ones(2, 4, requires_grad=True), num_processes=2)
    assert not plan.notes
    assert plan.setting.activations.flops > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixed_precision": "bf15"}, "mixed_precision is 'bf15'; it must be one of 'no', 'bf16'"),
        ({"num_processes": 0}, "num_processes is 0; it must be an int of at least 1"),
        ({"num_processes": 2.0}, "num_processes is 2.0; it must be an int"),
        ({"num_processes": "2"}, "num_processes is '2'; it must be an int"),
        ({"ranks_per_host": 0}, "ranks_per_host is 0; it must be an int of at least 1"),
        ({"num_processes": 4, "ranks_per_host": 3}, "4 ranks cannot be divided into hosts of 3"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of 'adamw'"),
        ({"optimizer": 3}, "optimizer is 3; it must be"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        nbaccel.plan(nn.Linear(3, 4), **{"num_processes": 2, **options})


def test_hosts_larger_than_the_launch_hold_all_of_it():
    plan = nbaccel.plan(nn.Linear(3, 4), num_processes=4, ranks_per_host=8)
    assert plan.setting.local_size == 4


@pytest.mark.parametrize(
    ("optimizer", "kind", "noted"),
    [
        (torch.optim.SGD, "sgd", False),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "momentum", False),
        (lambda parameters: torch.optim.Adam(parameters), "adam", False),
        (torch.optim.LBFGS, "adamw", True),
    ],
)
def test_optimizers_are_known_by_class_and_instance(optimizer, kind, noted):
    model = nn.Linear(3, 4)
    given = optimizer if isinstance(optimizer, type) else optimizer(model.parameters())
    plan = nbaccel.plan(model, optimizer=given, num_processes=2)
    assert plan.setting.optimizer == kind
    assert any("is not known: AdamW's is assumed" in note for note in plan.notes) == noted


def test_lazy_modules_are_asked_to_be_called_first():
    with pytest.raises(ConfigError, match=r"1\.weight of Sequential .* call the model once"):
        nbaccel.plan(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(3)), num_processes=2)
    with pytest.raises(ConfigError, match="running_mean of LazyBatchNorm1d"):
        nbaccel.plan(nn.LazyBatchNorm1d(affine=False), num_processes=2)


def test_405_billion_parameters_are_planned_when_they_are_on_the_meta_device():
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tokens = torch.empty(1, 4096, dtype=torch.long)
    h100 = machine_for("H100", device_type="cuda", device_bytes=80 * GIB, host_bytes=2**41)
    started = time.monotonic()
    plan = nbaccel.plan(
        model,
        batch={"input_ids": tokens, "labels": tokens},
        num_processes=512,
        ranks_per_host=8,
        mixed_precision="bf16",
        machine=h100,
    )
    assert time.monotonic() - started < 30  # 2 s on a quiet machine: a bound against a hang
    assert 405e9 < plan.size.parameters < 407e9
    rows = {one.spread.name: one for one in plan.candidates}
    assert rows["ddp"].memory.total > 16 * plan.size.parameters
    assert rows["fsdp"].memory.weights == pytest.approx(4 * plan.size.parameters / 512, rel=0.01)
    assert 6 * plan.size.parameters * 4096 == pytest.approx(plan.setting.activations.flops, rel=0.2)


def test_plan_in_the_kernel_reads_this_machine():
    plan = nbaccel.plan(nn.Linear(10, 10), num_processes=2)
    assert plan.chosen is not None
    assert plan.chosen.spread.name == "ddp"
    assert plan.machine.device_bytes > 0
    assert "give batch=" in str(plan)
