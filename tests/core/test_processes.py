"""Process control, configuration and collectives through the Accelerator."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig
from nbaccel.core import Accelerator
from nbaccel.core.trackers.jsonl import JsonlTracker
from nbaccel.errors import CollectiveMismatch, ConfigError


def _roles():
    acc = Accelerator(cpu=True)
    return {
        "ranks": (acc.process_index, acc.local_process_index, acc.num_processes),
        "flags": (acc.is_main_process, acc.is_local_main_process, acc.is_last_process, acc.use_distributed),
        "type": (acc.distributed_type, acc.device.type, acc.multi_device),
        "main": acc.on_main_process(lambda: "did")(),
        "local main": acc.on_local_main_process(lambda: "did")(),
        "last": acc.on_last_process(lambda: "did")(),
        "on 1": acc.on_process(process_index=1)(lambda: "did")(),
        "on local 1": acc.on_local_process(lambda: "did", local_process_index=1)(),
    }


def test_roles_when_on_two_ranks():
    rank0, rank1 = run_ranks(_roles)
    assert rank0["ranks"] == (0, 0, 2)
    assert rank1["ranks"] == (1, 1, 2)
    assert rank0["flags"] == (True, True, False, True)
    assert rank1["flags"] == (False, False, True, True)
    assert rank0["type"] == ("MULTI_CPU", "cpu", False)
    for name, on0 in {"main": 1, "local main": 1, "last": 0, "on 1": 0, "on local 1": 0}.items():
        assert rank0[name] == ("did" if on0 else None)
        assert rank1[name] == (None if on0 else "did")


def test_roles_when_alone():
    roles = _roles()
    assert roles["ranks"] == (0, 0, 1)
    assert roles["type"][0] == "NO"
    assert roles["last"] == "did"


def _first():
    acc = Accelerator(cpu=True)
    with acc.main_process_first():
        if acc.is_main_process:
            time.sleep(0.3)
        moment = time.monotonic()
    with acc.local_main_process_first():
        pass
    return moment


def test_main_process_first_when_it_is_slow():
    rank0, rank1 = run_ranks(_first)
    assert rank0 < rank1


def _split(pad):
    acc = Accelerator(cpu=True)
    with acc.split_between_processes({"a": [1, 2, 3], "t": torch.arange(3)}, apply_padding=pad) as part:
        return part["a"], part["t"].tolist()


def test_split_when_uneven():
    rank0, rank1 = run_ranks(lambda: [_split(pad) for pad in (False, True)])
    assert rank0 == [([1, 2], [0, 1])] * 2
    assert rank1 == [([3], [2]), ([3, 3], [2, 2])]


@pytest.mark.parametrize("pad", [False, True])
def test_split_when_there_are_fewer_than_ranks(pad):
    from nbaccel.core.processes import share_of

    parts = [share_of([7], rank=r, size=3, pad=pad) for r in range(3)]
    assert parts == [[7], [7] if pad else [], [7] if pad else []]
    with pytest.raises(ConfigError, match="one length"):
        share_of({"a": [1], "b": [1, 2]}, rank=0, size=2, pad=False)
    for nothing in (5, {"a": [1], "b": 5}, np.array(5), {1, 2}):
        with pytest.raises(ConfigError, match=r"cannot cut a (int|ndarray|set); give a list"):
            share_of(nothing, rank=0, size=2, pad=False)


def test_split_when_given_ranges_arrays_or_frames():
    import pandas as pd  # not above: the ranks would import it too

    from nbaccel.core.processes import share_of

    for whole in (range(5), np.arange(5), pd.Series(range(5)), deque(range(5))):
        parts = [[list(share_of(whole, rank=r, size=2, pad=pad)) for r in range(2)] for pad in (False, True)]
        assert parts == [[[0, 1, 2], [3, 4]], [[0, 1, 2], [3, 4, 4]]]
    frame = share_of(pd.DataFrame({"a": [1, 2, 3]}), rank=1, size=2, pad=True)
    assert frame["a"].tolist() == [3, 3]
    assert share_of(np.eye(3), rank=1, size=2, pad=False).tolist() == [[0, 0, 1]]


def _trigger():
    acc = Accelerator(cpu=True)
    seen = [acc.check_trigger()]
    if acc.process_index == 1:
        acc.set_trigger()
    return [*seen, acc.check_trigger(), acc.check_trigger()]


def test_trigger_when_one_rank_sets_it():
    assert run_ranks(_trigger) == [[False, True, False]] * 2


def _metrics(n, objects):
    acc = Accelerator(cpu=True)
    loader = acc.prepare(DataLoader(TensorDataset(torch.arange(n)), batch_size=4))
    seen = []
    for (x,) in loader:
        if objects:
            seen += acc.gather_for_metrics([f"s{i}" for i in x.tolist()], use_gather_object=True)
        else:
            got = acc.gather_for_metrics({"x": x, "wide": x[:, None].repeat(1, 200)})
            assert torch.equal(got["x"], got["wide"][:, 7])
            seen += got["x"].tolist()
    return seen


def test_gather_for_metrics_when_the_last_batch_is_uneven():
    cases = list(itertools.product([1, 8, 17, 22], [False, True]))
    for (n, objects), rank0, rank1 in zip(
        cases, *run_ranks(lambda: [_metrics(*case) for case in cases]), strict=True
    ):
        assert rank0 == rank1
        assert sorted(rank0) == sorted(f"s{i}" if objects else i for i in range(n)), (n, objects)


# --- configuration --------------------------------------------------------------------------------------


def test_configuration_when_the_launch_asked(monkeypatch):
    asked = RunConfig.from_mapping(
        {"device": "cpu", "gradient_accumulation_steps": 3, "seed": 5}, place="notebook_launcher(...)"
    )
    monkeypatch.setenv(RUN_CONFIG_VARIABLE, asked.to_json())
    acc = Accelerator()
    assert acc.gradient_accumulation_steps == 3
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    with pytest.raises(ConfigError, match=r"3 by notebook_launcher\(\.\.\.\) and 4 by Accelerator\(\.\.\.\)"):
        Accelerator(gradient_accumulation_steps=4)
    assert Accelerator(gradient_accumulation_steps=3).gradient_accumulation_steps == 3


def _single_on_two():
    with pytest.raises(ConfigError, match="there are 2 ranks"):
        Accelerator(cpu=True, strategy="single")
    return True


def test_configuration_when_single_is_asked_on_two_ranks():
    assert run_ranks(_single_on_two) == [True, True]


def _differing():
    rank = int(__import__("os").environ["RANK"])
    try:
        Accelerator(cpu=True, gradient_accumulation_steps=1 + rank, stop_after="1h")
    except CollectiveMismatch as error:
        return str(error)
    return "unnoticed"


def test_configuration_when_ranks_differ():
    for text in run_ranks(_differing):
        assert "rank 0: Accelerator of mixed_precision=no, accumulation=1" in text
        assert "rank 1: Accelerator of mixed_precision=no, accumulation=2" in text


# --- log ------------------------------------------------------------------------------------------------


def _log(folder):
    acc = Accelerator(cpu=True, project_dir=folder, log_with="jsonl")
    acc.init_trackers("run", config={"lr": 0.1})
    for step in range(3):
        acc.log({"loss": torch.tensor(float(acc.process_index + step))}, step=step, reduce="mean")
        acc.log({"mine": acc.process_index}, step=step)
    tokens = 16777217 if acc.is_main_process else 16777217.0  # past what float32 counts
    acc.log({"tokens": tokens, "counted": torch.tensor(16777217)}, step=3, reduce="sum")
    acc.end_training()


def test_log_when_reduced_over_ranks(tmp_path):
    import json

    run_ranks(_log, str(tmp_path))
    (file,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [0.5, 1.5, 2.5]
    assert [line["mine"] for line in lines if "mine" in line] == [0, 0, 0]
    assert (lines[-1]["tokens"], lines[-1]["counted"]) == (33554434, 33554434)


def test_log_when_the_tracker_is_an_object(tmp_path):
    tracker = JsonlTracker(tmp_path)
    acc = Accelerator(cpu=True, log_with=tracker)
    acc.init_trackers()
    assert acc.get_tracker("jsonl") is tracker
    acc.log({"loss": 1.5})
    acc.end_training()
    assert "1.5" in (tmp_path / "metrics.jsonl").read_text()


def _profiled(folder):
    acc = Accelerator(cpu=True)
    model = acc.prepare(nn.Linear(4, 1))
    with acc.profile(folder) as profiler:
        acc.backward(model(torch.ones(2, 4)).sum())
    return any("backward" in event.key.lower() for event in profiler.key_averages())


def test_profile_when_on_two_ranks_writes_a_trace_of_each(tmp_path):
    assert run_ranks(_profiled, tmp_path) == [True, True]
    for rank in (0, 1):
        trace = json.loads((tmp_path / f"trace-rank-{rank}.json").read_text())
        assert {"aten::linear", "autograd::engine::evaluate_function: AddmmBackward0"} <= {
            event.get("name") for event in trace["traceEvents"]
        }
        assert trace["distributedInfo"]["rank"] == rank
