"""A wrapped step costs little beside torch's own: counted in bytecodes, which no other process can change."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nbaccel.core import Accelerator

STEPS = 8


def _bytecodes(step):
    """Bytecodes that a call of `step` runs, on average over a window of each length."""
    for _ in range(STEPS):
        step()
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # what other tests left behind would be finalized in between, and counted
    sys.settrace(trace)
    try:
        for _ in range(STEPS):
            step()
    finally:
        sys.settrace(before)
        gc.enable()
    return count / STEPS


def _parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(2, 4)


def _raw(*, clip, every, autocast):
    model, optimizer, x = _parts()
    number = 0
    compute = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def step():
        nonlocal number
        number += 1
        with compute:
            out = model(x)
        loss = out.float().mean() / every
        loss.backward()
        if number % every == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _ours(*, clip, every, autocast, measure):
    model, optimizer, x = _parts()
    acc = Accelerator(
        cpu=True,
        mixed_precision="bf16" if autocast else "no",
        gradient_accumulation_steps=every,
        measure=measure,
    )
    model, optimizer = acc.prepare(model, optimizer)

    def step():
        with acc.accumulate(model) if every > 1 else nullcontext():
            loss = model(x).float().mean()
            acc.backward(loss)
            if clip:
                acc.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


@pytest.mark.filterwarnings("ignore:.*bf16.*")
@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        # A tenth more than there are; a raw plain step runs 2,110, about 15 ns each.
        ({}, 115),
        ({"clip": True}, 185),
        ({"every": 4}, 300),
        ({"autocast": True}, 180),
        ({"measure": True}, 205),
    ],
    ids=["plain", "clip", "accumulation", "bf16", "measured"],
)
def test_step_when_wrapped_runs_few_bytecodes_more_than_a_raw_one(options, at_most):
    asked = {"clip": False, "every": 1, "autocast": False, "measure": False} | options
    ours = _bytecodes(_ours(**asked))
    asked.pop("measure")
    raw = _bytecodes(_raw(**asked))
    assert ours - raw <= at_most
