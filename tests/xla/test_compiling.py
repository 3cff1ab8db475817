"""What is compiled again, what is not, and how either is seen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nbaccel import Accelerator, Session, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(num_processes=1, device="tpu") as started:
        yield started


def counts(*names: str) -> list[int]:
    import torch_xla

    return [int(torch_xla._XLAC._xla_counter_value(name) or 0) for name in names]


def train(sizes: list[int]) -> dict[str, int]:
    """A step for each batch size; how many graphs were compiled, and what the cache on disk said."""
    before = counts("UncachedCompile")[0]
    acc = Accelerator()
    model: Any = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    batches: Any = DataLoader([torch.ones(size, 8) for size in sizes], batch_size=None)
    model, optimizer = acc.prepare(model, optimizer)
    for batch in batches:
        acc.step(model(batch.to(acc.device)).mean(), optimizer)
    value = next(iter(model.parameters())).cpu()
    compiled, known = counts("UncachedCompile", "PersistentCacheDeserializeFailure")
    return {"compiled": compiled - before, "known on disk": known, "parameters": len(value)}


def test_second_call_of_a_session_compiles_nothing(session: Session) -> None:
    first, second = (session.run(train, [4, 4, 4])[0] for _ in range(2))
    other = session.run(train, [4, 5, 5])[0]
    assert first["compiled"] > 0
    assert second["compiled"] == 0
    assert 0 < other["compiled"] <= first["compiled"]


def test_second_launch_finds_its_programs_on_disk(tmp_path: Path) -> None:
    """The CPU's programs are written and found again, by the same names; only TPU's can be read back."""
    env = {"XLA_PERSISTENT_CACHE_PATH": str(tmp_path)}
    found = []
    for _ in range(2):
        ended = launch(train, [4, 4], num_processes=1, device="tpu", env=env).result(timeout=200)[0]
        found.append((ended["compiled"], ended["known on disk"], len(list(tmp_path.rglob("*")))))
    (compiled, known, files), again = found
    assert known == 0
    assert files >= compiled > 0
    assert again == (compiled, compiled, files)


def test_shapes_that_are_compiled_again_and_again_are_named_once(session: Session) -> None:
    run = session.submit(train, [8, 8, 7, 6, 9, 8])
    run.result(timeout=200)
    logged = run.logs(0)
    assert logged.count("XLA compile") == 1
    assert f"{__file__}:" in logged
    assert (
        "compiles the training step again for each new shape of the model's inputs, or of what came" in logged
    )
    assert "step 1: float32[8, 8]; step 3: float32[7, 8]; step 4: float32[6, 8]" in logged


def train_towards(widths: list[int]) -> None:
    """Steps for targets of these widths."""
    acc = Accelerator(verify=False)
    model: Any = nn.Linear(8, 1)
    pairs: Any = [(torch.ones(4, 8), torch.ones(4, width)) for width in widths]
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = acc.prepare(model, optimizer, DataLoader(pairs, batch_size=None))
    for features, wanted in loader:
        acc.step((model(features) - wanted).pow(2).mean(), optimizer)


def test_shapes_of_targets_that_are_compiled_again_and_again_are_named(session: Session) -> None:
    run = session.submit(train_towards, [2, 2, 3, 4])
    run.result(timeout=200)
    assert "step 1: float32[4, 8], float32[4, 2]; step 3: float32[4, 8], float32[4, 3]" in run.logs(0)


def deep(layers: int) -> float:
    """A graph that takes long to compile: no two of its matrices are of one size."""
    acc = Accelerator()
    value = torch.ones(2, 3).to(acc.device)
    for size in range(3, 3 + layers):
        value = torch.tanh(value @ torch.ones(size, size + 1, device=acc.device) / size)
    return value.mean().item()


def test_rank_that_compiles_says_so(session: Session) -> None:
    run = session.submit(deep, 80)
    seen = set()
    deadline = time.monotonic() + 200
    while not run.done() and time.monotonic() < deadline:
        seen.add(run.state.ranks[0].state)
        time.sleep(0.05)
    assert 0 < run.result(timeout=10)[0] <= 1
    assert "compiling" in seen


def logged(folder: str, log: bool) -> int:
    """How many graphs six steps run, each of which logs a value that the next one changes in place."""
    acc = Accelerator(log_with="jsonl", project_dir=folder, verify=False)
    acc.init_trackers("run")
    model: Any = nn.Linear(4, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    total = torch.zeros((), device=acc.device)
    before = executed()
    for _ in range(6):
        acc.step(model(torch.ones(2, 4).to(acc.device)).mean(), optimizer)
        total += 1
        if log:
            acc.log({"total": total})
    found = executed() - before
    acc.end_training()
    return found


def executed() -> int:
    import torch_xla

    torch_xla._XLAC._xla_wait_device_ops([])
    return int((torch_xla._XLAC._xla_metric_data("ExecuteTime") or (0,))[0])


def test_logging_neither_cuts_the_step_nor_waits_for_it(session: Session, tmp_path: Path) -> None:
    silent, told = (session.run(logged, str(tmp_path / str(log)), log)[0] for log in (False, True))
    assert told == silent == 6
    (file,) = tmp_path.rglob("True/**/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["total"] for line in lines] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def evaluate(batches: int) -> tuple[float, int]:
    """The sum of a model's outputs, kept on the device, and how many graphs were compiled for it."""
    acc = Accelerator(verify=False)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    rows = torch.arange(6.0 * batches).view(-1, 3) / 50
    model, loader = acc.prepare(model, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    model.eval()
    on_xla = acc.device.type == "xla"
    before, total = counts("UncachedCompile")[0] if on_xla else 0, torch.zeros((), device=acc.device)
    for batch in loader:
        with torch.no_grad():
            total = total + model(batch).sum()
    value = total.item()
    return value, counts("UncachedCompile")[0] - before if on_xla else 0


def test_an_evaluation_of_more_batches_compiles_nothing_more(session: Session) -> None:
    few, many = (session.run(evaluate, batches)[0] for batches in (3, 9))
    expected = launch(evaluate, 9, num_processes=1, device="cpu").result(timeout=200)[0]
    assert few[1] > 0
    assert many[1] == 0
    assert many[0] == pytest.approx(expected[0], rel=1e-5)


def distil(accumulation: int) -> int:
    """How many graphs two optimizer steps run, with a teacher that is called in each of their micro-steps."""
    acc = Accelerator(gradient_accumulation_steps=accumulation, verify=False)
    teacher: Any = nn.Linear(4, 2)
    student: Any = nn.Linear(4, 2)
    optimizer: Any = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher, student, optimizer = acc.prepare(teacher, student, optimizer)
    batch = torch.ones(2, 4).to(acc.device)
    before = executed()
    for _ in range(2 * accumulation):
        with acc.accumulate(student):
            with torch.no_grad():
                wanted = teacher(batch)
            acc.backward((student(batch) - wanted).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    return executed() - before


def test_model_without_gradients_within_a_step_of_training_does_not_cut_it(session: Session) -> None:
    assert session.run(distil, 3)[0] == 2


def evaluate_unlike(sizes: list[int]) -> list[float]:
    """The means of a model's outputs for batches of these sizes."""
    acc = Accelerator(verify=False)
    model: Any = acc.prepare(nn.Linear(7, 3))
    with torch.no_grad():
        return [model(torch.ones(size, 7).to(acc.device)).mean().item() for size in sizes]


def test_shapes_of_an_evaluation_are_named_once_and_a_last_batch_is_not(session: Session) -> None:
    silent, told = (session.submit(evaluate_unlike, sizes) for sizes in ([4, 4, 3, 4], [5, 6, 7, 8, 9]))
    assert [len(run.result(timeout=200)[0]) for run in (silent, told)] == [4, 5]
    assert "XLA" not in silent.logs(0)
    assert told.logs(0).count("XLA compiles the evaluation step again") == 1
    assert "step 1: float32[5, 7]; step 2: float32[6, 7]; step 3: float32[7, 7]" in told.logs(0)
