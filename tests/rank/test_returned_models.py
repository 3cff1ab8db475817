"""Models and tensors that a launch divided among its ranks come back plain and whole, as the user's own class."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel import FSDP, DeepSpeed, Pipeline, TensorParallel, notebook_launcher
from nbaccel.errors import WorkerError

PLAN = {"up": "column", "down": "row"}
WAYS: dict[str, Any] = {
    "ddp": "ddp",
    "full shard": FSDP(wrap="Linear"),
    "everything": FSDP(wrap="Linear", cpu_offload=True, activation_checkpointing=True),
    "divided": TensorParallel(plan=PLAN),
    "divided in shards": FSDP(tensor_parallel=TensorParallel(plan=PLAN, size=2)),
}
if importlib.util.find_spec("deepspeed"):
    WAYS |= {f"zero-{stage}": DeepSpeed(stage=stage) for stage in (1, 2, 3)}
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.out = nn.Linear(4, 4, bias=False)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.tied = self.out.weight
        self.out.register_forward_hook(double)
        self.reduce = torch.distributed.all_reduce  # an attribute of the user's own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.up(x).relu())) * self.scale

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def double(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def trained(strategy: Any, precision: str = "no") -> tuple[nn.Module, torch.Tensor]:
    from nbaccel import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision)
    torch.manual_seed(0)
    model: Any = Net()
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for _ in range(2):
        acc.step(model(X).float().pow(2).mean(), optimizer)
    return model, model(X).detach().float()


@pytest.fixture(scope="module")
def returned() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    def train() -> dict[str, tuple[nn.Module, torch.Tensor]]:
        return OrderedDict((way, trained(one)) for way, one in WAYS.items())

    return notebook_launcher(train, num_processes=2, device="cpu", returns="rank0")[0]


@pytest.mark.parametrize("way", WAYS)
def test_divided_model_comes_back_plain_and_whole(
    way: str, returned: dict[str, tuple[nn.Module, torch.Tensor]]
) -> None:
    model, output = returned[way]
    assert type(model) is Net
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert model.tied is model.out.weight
    assert not any(vars(p) for p in model.parameters())
    assert (len(model.out._forward_hooks), len(model._forward_pre_hooks)) == (1, 0)
    assert model.reduce is torch.distributed.all_reduce
    assert vars(model).keys() - vars(Net()) <= {"forward"}
    assert model.forward == types.MethodType(Net.forward, model)
    assert model.generate == types.MethodType(Net.generate, model)
    torch.testing.assert_close(model(X), output, atol=1e-6, rtol=1e-6)
    model(X).sum().backward()  # and it can be trained on
    assert model.up.weight.grad is not None


class Held:
    """What the user keeps a model in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_every_rank_has_its_copy_of_what_torch_alone_divided() -> None:
    def train() -> dict[str, Any]:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), normed)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        for layer in (model[0], normed):  # the other stays as it is
            fully_shard(layer, mp_policy=policy)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(X).sum().backward()
        norm = nn.utils.clip_grad_norm_(normed.parameters(), 1.0)
        optimizer.step()
        model(X)  # leaves its last layers gathered
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {
            "optimizer": optimizer,
            "held": Held(model),
            "scheduler": scheduler,
            "states": (model.state_dict(), optimizer.state_dict()),
            "norms": [norm],
        }

    for found in notebook_launcher(train, num_processes=2, device="cpu"):
        model, optimizer, (state, states) = found["held"].model, found["optimizer"], found["states"]
        assert [isinstance(part, nn.Linear) for part in model] == [True] * 3
        assert {type(tensor) for tensor in [*state.values(), *found["norms"]]} == {torch.Tensor}
        torch.testing.assert_close(dict(state), dict(model.state_dict()))
        assert optimizer.param_groups[0]["params"] == [*model.parameters()]
        assert found["scheduler"].optimizer is optimizer
        moment = optimizer.state[model[0].weight]["exp_avg"]
        assert moment.shape == (3, 4)
        assert torch.equal(states["state"][0]["exp_avg"], moment)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(X).sum().backward()
        optimizer.step()  # and it can be trained on
        assert not any(map(torch.equal, model.parameters(), before))


def test_tensor_that_one_rank_alone_returns_is_refused() -> None:
    def half() -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        tensor = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,)), [Shard(0)])
        return [tensor] if torch.distributed.get_rank() == 1 else None

    with pytest.raises(
        WorkerError, match=r"DTensor of shape \(8,\) is .*, but rank 0 returns no such tensor"
    ):
        notebook_launcher(half, num_processes=2, device="cpu")


def test_every_rank_has_the_whole_model_of_a_pipeline() -> None:
    def train() -> tuple[nn.Module, torch.Tensor]:
        from nbaccel import Accelerator

        acc = Accelerator(cpu=True, strategy=Pipeline(loss=nn.functional.mse_loss))
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Linear(4, 4))
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        acc.pipeline_step((X.repeat(4, 1), X.repeat(4, 1)))
        optimizer.step()
        with torch.no_grad():
            model.eval()
            return model, acc.pipeline_step((X, X))

    for model, loss in notebook_launcher(train, num_processes=2, device="cpu"):
        assert [type(part) for part in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear, nn.Linear]
        assert not any(part.training for part in model.modules())
        torch.testing.assert_close(nn.functional.mse_loss(model(X), X), loss, check_device=False)


@pytest.mark.parametrize("leaves", [False, True])
def test_ranks_that_return_no_such_model_are_named(leaves: bool) -> None:
    def train() -> Any:
        model, _ = trained(FSDP(wrap="Linear"))
        if leaves and torch.distributed.get_rank() == 1:
            sys.exit()
        return model if torch.distributed.get_rank() == 0 else None

    with pytest.raises(WorkerError, match=r"but rank 1 returns no such model. Return it on every rank"):
        notebook_launcher(train, num_processes=2, device="cpu")
    # nobody wants it: nobody waits
    assert list(notebook_launcher(train, num_processes=2, device="cpu", returns="none")) == [None, None]


def test_divided_model_that_outlives_its_group_is_refused_with_what_to_send() -> None:
    def train() -> nn.Module:
        model, _ = trained(FSDP(wrap="Linear"))
        torch.distributed.destroy_process_group()
        return model

    with pytest.raises(WorkerError, match=r"send accelerator.get_state_dict"):
        notebook_launcher(train, num_processes=2, device="cpu")
