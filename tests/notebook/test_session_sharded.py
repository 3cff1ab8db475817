"""A session whose model is sharded: what an interrupt in the middle of a step leaves behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from nbaccel import Session

TRAINING = """
import time, torch
from torch import nn
import nbaccel

torch.set_num_threads(1)
torch.manual_seed(0)
acc = nbaccel.Accelerator(strategy=nbaccel.FSDP(wrap="Linear"))
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
batch = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def step():
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    acc.backward(loss)
    optimizer.step()
    return loss.item()


def loss_of_copies():
    # the same weights in a plain model
    plain = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    plain.load_state_dict(acc.get_state_dict(model))
    return plain(batch).square().mean().item()


first = step()
"""


def test_sharded_model_trains_on_when_its_steps_were_interrupted(warm: None) -> None:
    with Session(2, device="cpu", grace=2.0) as session:
        session.execute(TRAINING)
        for delay in (0.5, 0.53, 0.56, 0.59):  # anywhere in a step
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                session.execute("while True: last = step()")
            session.execute("found = [(loss_of_copies(), step()) for _ in range(3)]")
            ranks = session.pull("found")
            for expected, loss in ranks[0]:
                assert loss == pytest.approx(expected, rel=1e-5)
            assert ranks[0] == ranks[1]
            assert ranks[0][-1][1] < session.pull("first")[0]
