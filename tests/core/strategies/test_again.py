"""One Accelerator for several models: beside a teacher, one after another; and models the user had compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import FSDP, DeepSpeed, Pipeline, TensorParallel
from nbaccel.core import Accelerator
from tests.conftest import needs

pytestmark = pytest.mark.timeout(300)

INPUTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def steps(acc: Any, model: Any, optimizer: Any, teacher: nn.Module | None = None) -> None:
    for _ in range(2):
        target = INPUTS if teacher is None else teacher(INPUTS).detach()
        acc.backward((model(INPUTS) - target).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def taught(strategy: Any, folder: str, save: bool) -> dict[str, torch.Tensor]:
    """Weights after two steps; saved before them, or loaded."""
    acc = Accelerator(cpu=True, strategy=strategy)
    student, teacher = net(0 if save else 2), net(1 if save else 3)
    model, optimizer = acc.prepare(student, torch.optim.AdamW(student.parameters(), lr=0.1))
    teacher = acc.prepare_model(teacher, evaluation_mode=True)
    if save:
        steps(acc, model, optimizer, teacher)
        acc.save_state(folder)
    else:
        acc.load_state(folder)
    steps(acc, model, optimizer, teacher)
    return acc.get_state_dict(model)


def all_taught(jobs: list[tuple[Any, str]], save: bool) -> list[dict[str, torch.Tensor]]:
    return [taught(strategy, folder, save) for strategy, folder in jobs]


@needs("deepspeed")
def test_checkpoint_of_a_student_and_its_teacher_moves_to_and_from_zero(tmp_path: Path) -> None:
    folders = {"ddp": str(tmp_path / "ddp"), "zero": str(tmp_path / "zero")}
    jobs = [("ddp", folders["ddp"]), (DeepSpeed(stage=2), folders["zero"])]
    wanted = run_ranks(all_taught, jobs, True)[0][0]
    loading = ["fsdp", "ddp", DeepSpeed(stage=2), DeepSpeed(stage=3)]
    for told in run_ranks(
        all_taught, [(one, folder) for folder in folders.values() for one in loading], False
    ):
        for found in told:
            for name, weight in wanted.items():
                assert (found[name] - weight).abs().max() <= 2e-5, name


def in_turn(strategies: list[Any]) -> list[str]:
    """Whether a model is gone from memory after `free_memory`, with the Accelerator used for another one then."""
    import gc
    import weakref

    from torch.nn.functional import mse_loss

    found = []
    for strategy in strategies:
        acc = Accelerator(cpu=True, strategy=strategy, verify=strategy in ("ddp", "fsdp"))
        pipeline = isinstance(strategy, Pipeline)
        for seed in (0, 1):
            made = net(seed)
            model, optimizer = acc.prepare(made, torch.optim.AdamW(made.parameters(), lr=0.1))
            if pipeline:
                assert strategy.loss is mse_loss
                acc.pipeline_step((INPUTS, INPUTS))
                optimizer.step()
            else:
                steps(acc, model, optimizer)
            gone = weakref.ref(acc.unwrap_model(model))
            model, optimizer, made = acc.free_memory(model, optimizer, made)
            gc.collect()
        found.append("gone" if gone() is None else "held")
    return found


def strategies() -> list[Any]:
    from torch.nn.functional import mse_loss

    plan = TensorParallel(plan={"0": "column", "2": "row"})
    zero = [DeepSpeed(stage=stage) for stage in (1, 2, 3)] if importlib.util.find_spec("deepspeed") else []
    return ["ddp", "fsdp", FSDP(sharding="shard_grad_op"), plan, Pipeline(loss=mse_loss), *zero]


def test_accelerator_when_its_memory_is_freed_takes_another_model() -> None:
    listed = strategies()
    for found in run_ranks(in_turn, listed):
        assert found == ["gone"] * len(listed)


def both_compiled() -> list[dict[str, torch.Tensor]]:
    return [compiled("ddp"), compiled("fsdp")]


def compiled(strategy: Any) -> dict[str, torch.Tensor]:
    """Weights of a model that the user had compiled, in micro-steps of its own."""
    acc = Accelerator(cpu=True, strategy=strategy)
    made: Any = torch.compile(net(0), backend="eager")
    model, optimizer = acc.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    for _ in range(2):
        with acc.accumulate(model):
            acc.backward((model(INPUTS) - INPUTS).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    inner = acc.unwrap_model(model, keep_torch_compile=False)
    assert not hasattr(inner, "_orig_mod")
    return {name.removeprefix("_orig_mod."): value for name, value in acc.get_state_dict(model).items()}


def test_model_when_the_user_has_compiled_it_trains_in_micro_steps() -> None:
    (alone,) = run_ranks(compiled, "single", num_processes=1)
    for told in run_ranks(both_compiled):
        for found in told:
            assert found.keys() == alone.keys()
            for name, weight in alone.items():
                assert (found[name] - weight).abs().max() <= 2e-5, name


def test_container_when_it_is_empty_is_itself() -> None:
    acc = Accelerator(cpu=True)
    empty = nn.ModuleList()
    prepared = acc.prepare(empty)
    with acc.accumulate(empty):
        pass
    assert acc.unwrap_model(prepared) is empty
