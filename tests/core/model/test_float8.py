"""Linear layers in float8: the numbers of a calculation by hand, and training on one and two ranks."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel.core.model.float8 import Float8Forward, compute_in_float8, restore_linears
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision='fp8' is emulated")
WIDTH, CLASSES, STEPS = 32, 16, 10


def rounded(x: torch.Tensor, dtype: torch.dtype, dim: int | None = None) -> torch.Tensor:
    """To float8 and back; the largest value of the matrix (of each row along `dim`) becomes the format's own."""
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest.double()
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))  # rowwise scales are powers of two
    scale = scale.float()
    return (x * scale).to(dtype).float() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layer_when_in_float8_computes_what_is_rounded_by_hand(recipe: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(8, 32, requires_grad=True)
    with torch.no_grad():
        layer.weight[0] *= 50  # one scale for all hurts the other rows
    compute_in_float8(layer, FP8Options(recipe=recipe, skip=[]), emulate=True)
    y = layer(x)
    along, across = (None, None) if recipe == "tensorwise" else (1, 0)
    low, wide = torch.float8_e4m3fn, torch.float8_e5m2
    by_hand = rounded(x, low, along) @ rounded(layer.weight, low, along).T + layer.bias
    torch.testing.assert_close(y, by_hand)
    assert (y - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() > 1e-3
    gradient = torch.randn_like(y)
    y.backward(gradient)
    of_gradients = wide if recipe == "tensorwise" else low
    torch.testing.assert_close(
        x.grad, rounded(gradient, of_gradients, along) @ rounded(layer.weight, low, across)
    )
    torch.testing.assert_close(
        layer.weight.grad, rounded(gradient, of_gradients, across).T @ rounded(x, low, across)
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.odd = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + nn.functional.gelu(block(x))
        return self.head(x + self.odd(x).sum(-1, keepdim=True))


def in_float8(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_modules() if isinstance(one.forward, Float8Forward)]


def test_layers_when_chosen_leave_out_the_last_and_odd_sizes() -> None:
    model = Net()
    compute_in_float8(model, FP8Options(), emulate=True)
    assert in_float8(model) == ["blocks.0", "blocks.1", "blocks.2"]
    compute_in_float8(model, FP8Options(skip=["blocks.*"]), emulate=True)
    assert in_float8(model) == ["head"]
    assert type(model.head) is nn.Linear
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert in_float8(copied) == []
        assert copied.state_dict().keys() == model.state_dict().keys()
    restore_linears(model)
    assert in_float8(model) == []


def test_layers_when_none_can_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no layer.*multiples of 16.*skip=\[\].*'bf16'"):
        compute_in_float8(nn.Linear(16, 16), FP8Options(), emulate=True)
    with pytest.raises(ConfigError, match=r"'blocks\.\*\.up'.*blocks\.0"):
        compute_in_float8(Net(), FP8Options(skip=["blocks.*.up"]), emulate=True)


def test_packages_when_absent_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"'nbaccel\[fp8\]'"):
        compute_in_float8(Net(), FP8Options(), emulate=True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(ConfigError, match=r"'nbaccel\[transformer-engine\]'"):
        compute_in_float8(Net(), FP8Options(backend="transformer_engine"), emulate=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "blockwise"}, "'tensorwise', 'rowwise'"),
        ({"backend": "msamp"}, "'torchao'"),
        ({"skip": "head"}, "list of names"),
        ({"backend": "transformer_engine", "recipe": "rowwise"}, "torchao's"),
    ],
)
def test_options_when_impossible_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FP8Options(**options)


def train(strategy: Any, precision: str, recipe: Any = "tensorwise") -> dict[str, Any]:
    from nbaccel import Accelerator

    fp8 = FP8Options(recipe=recipe) if precision == "fp8" else None
    acc = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision, fp8=fp8)
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(16 * STEPS, WIDTH)
    data = torch.utils.data.TensorDataset(x, x[:, :CLASSES].argmax(1))
    loader = torch.utils.data.DataLoader(data, batch_size=16 // acc.num_processes)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    losses = []
    for inputs, targets in loader:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        acc.backward(loss)
        acc.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(acc.reduce(loss.detach(), "mean").item())
    layers = in_float8(acc.unwrap_model(model))
    acc.unwrap_model(model, keep_fp32_wrapper=False)
    return {
        "losses": losses,
        "layers": layers,
        "left": in_float8(acc.unwrap_model(model)),
        "kind": acc.mixed_precision,
        "state": {name: tuple(value.shape) for name, value in acc.get_state_dict(model).items()},
    }


def on_two_ranks() -> tuple[dict[str, Any], list[str]]:
    from nbaccel import FSDP

    ways = ("ddp", FSDP(wrap="Linear"))
    return {r: [train(way, "fp8", r) for way in ways] for r in ("tensorwise", "rowwise")}, wrong()


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[dict[str, Any], list[str]]]:
    return run_ranks(on_two_ranks)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_training_when_in_float8_follows_one_process_under_ddp_and_fsdp(
    recipe: Any, two_ranks: list[tuple[dict[str, Any], list[str]]]
) -> None:
    alone = train("single", "fp8", recipe)
    assert alone["layers"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert (alone["left"], alone["kind"]) == ([], "fp8")
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]
    plain = train("single", "no")
    # float8's precision is 2 to 3 binary digits: near float32, and not it
    assert 1e-4 < max(abs(a - b) for a, b in zip(alone["losses"], plain["losses"], strict=True)) < 5e-2
    for found, _ in two_ranks:
        for way in found[recipe]:
            assert way["layers"] == alone["layers"]
            assert max(abs(a - b) for a, b in zip(way["losses"], alone["losses"], strict=True)) <= 2e-2
            assert way["state"] == alone["state"]


def wrong() -> list[str]:
    from nbaccel import Accelerator, DeepSpeed, TensorParallel

    said = []
    for options in (
        {"strategy": TensorParallel(size=2), "mixed_precision": "fp8"},
        {"strategy": DeepSpeed(stage=1), "mixed_precision": "fp8"},
        {"mixed_precision": "bf16", "fp8": FP8Options()},
    ):
        with pytest.raises(ConfigError) as caught:
            Accelerator(cpu=True, **options)
        said.append(str(caught.value))
    return said


def test_combinations_when_impossible_are_refused(
    two_ranks: list[tuple[dict[str, Any], list[str]]],
) -> None:
    for _, said in two_ranks:
        assert "tensor parallelism" in said[0]
        assert "DeepSpeed" in said[1]
        assert "mixed_precision is 'bf16'" in said[2]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a CUDA device with float8 instructions",
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("compiled", [False, True])
def test_layer_when_on_a_device_agrees_with_what_is_emulated(recipe: Any, compiled: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, device="cuda"), torch.randn(40, 64, device="cuda", requires_grad=True)
    found = []
    for emulate in (True, False):
        compute_in_float8(layer, FP8Options(recipe=recipe, skip=[]), emulate=emulate)
        run = torch.compile(layer) if compiled else layer
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        y.float().square().mean().backward()
        found.append([y.detach(), x.grad, layer.weight.grad])
        x.grad = layer.weight.grad = layer.bias.grad = None
    for emulated, real in zip(*found, strict=True):
        torch.testing.assert_close(real, emulated, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_layer_when_by_transformer_engine_agrees_with_torchao() -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="needs transformer-engine and a CUDA device")
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, device="cuda"), torch.randn(48, 64, device="cuda", requires_grad=True)
    found = []
    for backend in ("torchao", "transformer_engine"):
        compute_in_float8(layer, FP8Options(backend=backend, skip=[]), emulate=False)
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        found.append([y.detach(), x.grad, layer.weight.grad])
        x.grad = layer.weight.grad = layer.bias.grad = None
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
