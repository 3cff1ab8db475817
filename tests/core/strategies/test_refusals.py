"""What a strategy cannot do is said before anything is trained, with the parameter or module and what to do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import FSDP, DeepSpeed, TensorParallel
from nbaccel.config import RunConfig
from nbaccel.core import Accelerator
from nbaccel.core.assembly import choose_strategy
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.ddp import DDPOptions
from nbaccel.core.world import World
from nbaccel.errors import ConfigError, TrustError
from tests.conftest import needs

pytestmark = pytest.mark.timeout(300)


def said(strategy: Any, model: nn.Module, optimizer: Any = torch.optim.AdamW, **options: Any) -> str:
    acc = Accelerator(cpu=True, strategy=strategy, **options)
    try:
        acc.prepare(model, optimizer(model.parameters()))
    except (ConfigError, TrustError) as error:
        return str(error)
    return "was taken"


def with_parameter(parameter: torch.Tensor) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2))
    made.register_parameter("odd", nn.Parameter(parameter))
    return made


def unequal() -> nn.Module:
    made = nn.Linear(2, 2)
    made.bias.requires_grad_(os.environ["RANK"] == "0")
    return made


def two_types() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())


def hooked() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2))
    made[0].weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return made


def hooked_late() -> str:
    acc = Accelerator(cpu=True, strategy="fsdp")
    model = acc.prepare(nn.Linear(2, 2))
    model.weight.register_post_accumulate_grad_hook(lambda _: None)  # torch calls these
    acc.backward(model(torch.ones(1, 2)).sum())
    model.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    try:
        acc.backward(model(torch.ones(1, 2)).sum())
    except ConfigError as error:
        return str(error)
    return "was taken"


def shared() -> str:
    acc, encoder = Accelerator(cpu=True, strategy="fsdp"), nn.Linear(2, 2)
    acc.prepare(nn.Sequential(encoder, nn.ReLU()))(torch.ones(1, 2))  # gathered, for a backward
    try:
        acc.prepare(nn.Sequential(encoder, nn.Tanh()))
    except ConfigError as error:
        return str(error)
    return "was taken"


def half_divided() -> nn.Module:
    acc = Accelerator(cpu=True, strategy=TensorParallel(plan={"0": "column"}))
    return nn.Sequential(acc.prepare(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))


class Adafactor(torch.optim.Adafactor):
    """One of the user's own."""


def sharded() -> dict[str, str]:
    plan = TensorParallel(plan={"0": "column"})
    late = Accelerator(cpu=True, strategy="fsdp")
    model = late.prepare(nn.Linear(2, 2))
    try:
        late.prepare(torch.optim.LBFGS(model.parameters()))
        alone = "was taken"
    except ConfigError as error:
        alone = str(error)
    return {
        "fsdp, LBFGS": said("fsdp", nn.Linear(2, 2), torch.optim.LBFGS),
        "fsdp, LBFGS alone": alone,
        "fsdp, Adafactor": said("fsdp", nn.Linear(2, 2), Adafactor),
        "divided, Adafactor": said(plan, nn.Sequential(nn.Linear(2, 2)), torch.optim.Adafactor),
        "fsdp, scalar": said("fsdp", with_parameter(torch.tensor(1.0))),
        "fsdp, two types": said(FSDP(wrap="none"), two_types()),
        "fsdp, two types apart": said(FSDP(wrap="Linear"), two_types()),
        "fsdp, hook": said("fsdp", hooked()),
        "fsdp, late hook": hooked_late(),
        "fsdp, shared": shared(),
        "fsdp, unequal": said("fsdp", unequal()),
        "fsdp, sparse": said("fsdp", nn.Sequential(nn.Embedding(4, 2, sparse=True))),
        "divided, hook": said(plan, hooked()),
        "ddp, divided": said("ddp", half_divided()),
        "fsdp, divided": said("fsdp", half_divided()),
        "divided, half": said(TensorParallel(plan={"0.0": "column", "1": "row"}), half_divided()),
        "fsdp, inside attention": said(
            FSDP(wrap=lambda one: isinstance(one, nn.Linear)), nn.TransformerEncoderLayer(4, 2, 8)
        ),
    }


def test_what_cannot_be_sharded_is_named() -> None:
    for found in run_ranks(sharded):
        assert "LBFGS cannot go with strategy 'fsdp'" in found["fsdp, LBFGS"]
        assert found["fsdp, LBFGS alone"] == found["fsdp, LBFGS"]
        assert "Adafactor cannot go with strategy 'fsdp'" in found["fsdp, Adafactor"]
        assert "Use strategy 'ddp'" in found["fsdp, Adafactor"]
        assert "Adafactor cannot go with strategy 'tensor_parallel'" in found["divided, Adafactor"]
        assert "odd is a parameter without a dimension" in found["fsdp, scalar"]
        assert (
            "0.weight is torch.float32 and 1.weight is torch.float64, and strategy 'fsdp'"
            in found["fsdp, two types"]
        )
        assert found["fsdp, two types apart"] == "was taken"
        assert "0.weight has a hook on its gradient" in found["fsdp, hook"]
        assert found["divided, hook"] == found["fsdp, hook"].replace("'fsdp'", "'tensor_parallel'")
        assert "0.0.weight is divided over the ranks already (a DTensor)" in found["ddp, divided"]
        assert found["fsdp, divided"] == found["ddp, divided"].replace("'ddp'", "'fsdp'")
        assert "1.weight is to be divided by the plan, and is not" in found["divided, half"]
        assert "register_hook was called on weight after prepare" in found["fsdp, late hook"]
        assert "0.weight is a parameter of another model that was prepared before" in found["fsdp, shared"]
        assert (
            "rank 0 has 'bias' [2] of float32 and rank 1 'bias' [2] of float32 (frozen)"
            in found["fsdp, unequal"]
        )
        assert "0 is an Embedding(sparse=True)" in found["fsdp, sparse"]
        assert "NonDynamicallyQuantizableLinear, which is never called" in found["fsdp, inside attention"]


def under_zero() -> dict[str, str]:
    def caught(do: Callable[[], Any]) -> str:
        try:
            do()
        except ConfigError as error:
            return str(error)
        return "was taken"

    def of_two() -> None:
        one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=1))
        acc.prepare(one, two, torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1))

    def prepared(stage: int) -> Any:
        net = nn.Linear(2, 2)
        acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=stage))
        return acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))

    def of_bf16() -> str:
        net = nn.Linear(2, 2).to(torch.bfloat16)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            said(DeepSpeed(stage=2), net, mixed_precision="no")
        return "".join(str(one.message) for one in told if "mixed_precision" in str(one.message))

    def frozen_in_a_pass() -> None:
        acc, net = Accelerator(cpu=True, strategy=DeepSpeed(stage=2)), nn.Linear(2, 2)
        model, _ = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        net.bias.requires_grad_(False)
        acc.backward(model(torch.ones(1, 2)).sum())

    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model, optimizer = prepared(1)
    return {
        "unequal": said(DeepSpeed(stage=2), unequal()),
        "sparse": said(DeepSpeed(stage=2), nn.Sequential(nn.Embedding(4, 2, sparse=True))),
        "two types in a group": said(DeepSpeed(stage=2), two_types()),
        "bf16": of_bf16(),
        "two models": caught(of_two),
        "group": caught(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
        "weights": caught(lambda: model.load_state_dict(model.state_dict())),
        "shards": caught(lambda: (lambda one: one.load_state_dict(one.state_dict()))(prepared(3)[0])),
        "frozen": caught(frozen_in_a_pass),
        "empty": said(DeepSpeed(stage=3), with_parameter(torch.empty(0))),
        "two types": said(DeepSpeed(stage=3), two_types()),
        "norm": said(DeepSpeed(stage=2), norm, mixed_precision="bf16"),
        "compiled": said(DeepSpeed(stage=2), torch.compile(nn.Linear(2, 2), backend="eager")),  # type: ignore[arg-type]
    }


@needs("deepspeed")
@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_what_zero_cannot_do_is_named() -> None:
    for rank, found in enumerate(run_ranks(under_zero)):
        assert "0 is an Embedding(sparse=True)" in found["sparse"]
        assert "sparse=False" in found["sparse"]
        assert (
            "rank 0 has 'bias' [2] of float32 and rank 1 'bias' [2] of float32 (frozen)" in found["unequal"]
        )
        assert "parameters of group 0 of the optimizer are torch.float32" in found["two types in a group"]
        assert ("mixed_precision='bf16'" in found["bf16"]) == (rank == 0)
        assert "group 0 of the optimizer has parameters that are not the model's" in found["two models"]
        assert "add_param_group cannot go with ZeRO" in found["group"]
        assert "acc.load_model(model, folder)" in found["weights"]
        assert found["shards"] == found["weights"]
        assert found["frozen"].startswith("'bias' learned when the model was prepared and does not now")
        assert "odd is a parameter without elements" in found["empty"]
        assert "0.bias is torch.float32 and 1.bias is torch.float64" in found["two types"]
        assert "1 is a BatchNorm1d" in found["norm"]
        assert "Accelerator(compile=True)" in found["compiled"]


def adapted() -> str:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    warnings.simplefilter("ignore")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    return said(TensorParallel(), model)


@needs("peft")
@needs("transformers")
def test_adapters_when_the_plan_finds_them_are_named() -> None:
    for found in run_ranks(adapted):
        assert "q_proj' is a peft.tuners.lora.layer.Linear and no nn.Linear" in found


def test_compile_is_refused_on_xla_devices() -> None:
    world = World(rank=0, local_rank=0, size=2, local_size=2, device=torch.device("xla", 0), backend="gloo")
    precision = Precision(kind="no", device_type="xla", why="")
    with pytest.raises(ConfigError, match="compile=True cannot be honoured on XLA devices"):
        choose_strategy(RunConfig(compile=True), world, DDPOptions(), precision)
