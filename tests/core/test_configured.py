"""A bare Accelerator does what the launch, a file or the environment asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig
from nbaccel.core.accelerator import Accelerator
from nbaccel.core.strategies.ddp import DDPOptions
from nbaccel.errors import ConfigError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Sets what the launch asked."""

    def ask(**values):
        config = RunConfig.from_mapping({"device": "cpu", **values}, place="nbaccel.yaml:1")
        monkeypatch.setenv(RUN_CONFIG_VARIABLE, config.to_json())

    return ask


def test_loader_options_are_those_asked(asked):
    asked(split_batches=True, even_batches=True, dispatch_batches=True)
    acc = Accelerator()
    assert (acc.split_batches, acc.even_batches, acc.dispatch_batches) == (True, True, True)
    asked()
    acc = Accelerator()
    assert (acc.split_batches, acc.even_batches, acc.dispatch_batches) == (False, False, False)
    asked(split_batches=True)
    with pytest.raises(ConfigError, match=r"split_batches is asked twice: True by nbaccel\.yaml:1"):
        Accelerator(split_batches=False)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_scheduler_rule_is_the_one_asked(asked):
    asked(step_scheduler_with_optimizer=False, gradient_accumulation_steps=2)
    acc = Accelerator()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = acc.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    acc.prepare(model, optimizer)
    with acc.accumulate(model):
        scheduler.step()  # on its own account: although the window goes on
    assert scheduler.get_last_lr() == [0.5]


def test_clipping_asked_is_applied_by_step_and_refused_when_the_loop_differs(asked):
    asked(gradient_clipping=0.5)
    acc = Accelerator()
    model, optimizer, loader = acc.prepare(
        model := nn.Linear(4, 1),
        torch.optim.SGD(model.parameters(), lr=1.0),
        DataLoader(TensorDataset(torch.ones(2, 4)), batch_size=2),
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for (x,) in loader:
        norm = acc.step(100 * model(x).sum(), optimizer)
        assert norm is not None
        assert norm > 100
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(ConfigError, match=r"0\.5 by nbaccel\.yaml:1 and 1\.0 by the loop"):
        acc.clip_grad_norm_(model.parameters(), 1.0)
    asked()
    with pytest.raises(ConfigError, match="needs max_norm"):
        Accelerator().clip_grad_norm_(model.parameters())


def test_ddp_options_asked_twice_are_refused(asked):
    asked(ddp={"bucket_cap_mb": 50})
    assert Accelerator(ddp=DDPOptions(bucket_cap_mb=50)).strategy.name == "single"
    with pytest.raises(ConfigError, match="ddp is asked twice"):
        Accelerator(ddp=DDPOptions(bucket_cap_mb=25))
