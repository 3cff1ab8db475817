"""A streamed weight while its layer does not run: used, described, written to, trained."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nbaccel import remove_hooks
from nbaccel.errors import ConfigError
from tests.core.offload.models import both, linears

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Borrowing(nn.Module):
    """Computes with a layer's weight without calling the layer."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.called, self.used, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.use(self.used.weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.H,
        lambda w: w.mH,
        lambda w: w.data,
        lambda w: w.data.t(),
        lambda w: w.real,
        lambda w: w.detach(),
        lambda w: torch.detach(w),
        lambda w: w[0:4],
        lambda w: torch.cat([w[:2], w[2:]]),
    ],
)
def test_streamed_weight_when_used_by_itself_is_the_weight(
    use: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    plain, loaded = both(lambda: Borrowing(use), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(X), plain(X))


def test_streamed_weight_when_asked_for_its_device_says_where_it_runs(tmp_path: Path) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(next(self.parameters()).device)))

    plain, loaded = both(Asking, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(X), plain(X))
    weight = loaded.a.weight
    assert (weight.device.type, weight.is_cpu, weight.is_cuda) == ("cpu", True, False)
    assert (weight.shape, weight.dtype, weight.requires_grad, weight.is_meta) == (
        (4, 4),
        torch.float64,
        True,
        True,
    )


def test_streamed_weights_when_saved_by_name_are_the_weights(tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    save_file(dict(loaded.named_parameters()), tmp_path / "named")
    found = load_file(tmp_path / "named")
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())


def test_encoder_when_tokens_are_padded_answers_as_in_memory(tmp_path: Path) -> None:
    plain, loaded = both(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=True
        ),
        tmp_path,
    )
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 5, 8)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors")
        wanted = plain(x, src_key_padding_mask=padding)
        assert torch.equal(loaded(x, src_key_padding_mask=padding), wanted)
    assert torch.equal(wanted[0, 3:], torch.zeros(2, 8)), "torch's fast path was taken"
    assert all(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_training_streamed_weights_is_refused(layers: int, tmp_path: Path) -> None:
    _, loaded = both(lambda: linears(layers), tmp_path)
    with pytest.raises(
        ConfigError, match=r"is streamed: it cannot be trained.*; remove_hooks\(model\) first"
    ):
        loaded(X).sum().backward()
    with pytest.raises(ConfigError, match="cannot be trained"):
        F.linear(X, loaded[0].weight).sum().backward()
    plain = remove_hooks(loaded)
    plain(X).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_frozen_streamed_weights_need_no_gradients(tmp_path: Path) -> None:
    _, loaded = both(linears, tmp_path)
    loaded.requires_grad_(False)
    assert not loaded(X).requires_grad
    remove_hooks(loaded)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("layers", [1, 8])
def test_gradients_of_the_input_are_right_or_refused(layers: int, tmp_path: Path) -> None:
    plain, loaded = both(lambda: linears(layers), tmp_path)
    plain.requires_grad_(False)
    loaded.requires_grad_(False)
    x, also = X.clone().requires_grad_(), X.clone().requires_grad_()
    plain(x).sum().backward()
    if layers == 1:
        loaded(also).sum().backward()
        assert torch.equal(also.grad, x.grad)  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match=r"is streamed: .* a gradient comes back through its layer"):
            loaded(also).sum().backward()


class Recomputed(nn.Module):
    """Whose activations are computed again in the backward pass, with weights that are brought again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_gradients_through_what_is_recomputed_are_refused(tmp_path: Path) -> None:
    _, loaded = both(lambda: nn.Sequential(Recomputed(), Recomputed()), tmp_path)
    loaded.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"is streamed: .* a gradient comes back through its layer"):
        loaded(X.clone().requires_grad_()).sum().backward()


def _assign(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))


def _load(model: Any) -> None:
    model[0].load_state_dict({k: torch.ones_like(v) for k, v in model[0].state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_assign, _load])
def test_parameter_that_is_assigned_stays_and_is_used(change: Callable[[Any], None], tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    for model in (plain, loaded):
        change(model)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(loaded(X), plain(X))
    assert torch.equal(loaded.state_dict()["0.weight"], torch.ones(4, 4))
    assert torch.equal(remove_hooks(loaded)[0].weight, torch.ones(4, 4))


def test_functional_call_uses_what_it_is_given(tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    state = {name: torch.ones_like(tensor) for name, tensor in plain.state_dict().items()}
    assert torch.equal(functional_call(loaded, state, (X,)), functional_call(plain, state, (X,)))
    with torch.no_grad():
        assert torch.equal(loaded(X), plain(X)), "its own weights afterwards"


def _set_data(weight: Any) -> None:
    weight.data = torch.zeros(4, 4)


def _index(weight: Any) -> None:
    weight[0] = 0


def _add(weight: Any) -> None:
    weight += 1


@pytest.mark.parametrize(
    "write",
    [
        _set_data,
        _index,
        _add,
        lambda weight: weight.mul_(2),
        lambda weight: weight.copy_(torch.zeros(4, 4)),
        lambda weight: nn.init.zeros_(weight),
        lambda weight: torch.add(X[0], 1, out=weight),
        lambda weight: torch._foreach_mul_([weight], 2),
        lambda weight: weight.register_hook(print),
    ],
)
def test_writing_to_a_streamed_weight_is_refused(write: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"1\.weight is streamed.*remove_hooks\(model\) first"),
    ):
        write(loaded[1].weight)
    with torch.no_grad():
        assert torch.equal(loaded(X), plain(X))


def test_loading_into_a_streamed_layer_is_refused(tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    with pytest.warns(UserWarning, match="meta parameter"), pytest.raises(RuntimeError, match="remove_hooks"):
        loaded[0].load_state_dict(plain[0].state_dict())


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


MOVES: list[Callable[[nn.Module], Any]] = [
    lambda part: part.to("cpu"),
    lambda part: part.half(),
    lambda part: part.to_empty(device="meta"),
]


@pytest.mark.parametrize("move", MOVES)
def test_moving_a_part_with_streamed_weights_warns_and_changes_nothing(
    move: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    plain, loaded = both(lambda: nn.Sequential(nn.Sequential(linears(), nn.LSTM(4, 4))), tmp_path)
    for part in (loaded[0], loaded[0][0][1], loaded[0][1]):
        with pytest.warns(UserWarning, match="this model is dispatched") as said:
            assert move(part) is part
        assert [warning.filename for warning in said] == [__file__], "said once, of this line"
    assert all(p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(X)[0], plain(X)[0])
    copied = copy.deepcopy(loaded[0]).half()
    assert {p.dtype for p in copied.parameters()} == {torch.float16}
    part = pickle.loads(pickle.dumps(loaded[0][0])).half()
    assert {p.dtype for p in part.parameters()} == {torch.float16}
    part = remove_hooks(loaded)[0].half()
    assert {p.dtype for p in part.parameters()} == {torch.float16}


@pytest.mark.parametrize("move", MOVES)
def test_moving_a_part_that_is_pickled_in_its_own_way_is_refused(
    move: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    _, loaded = both(lambda: nn.Sequential(torch.fx.symbolic_trace(Scaling())), tmp_path)
    with pytest.raises(ConfigError, match=r"0\.scale is streamed: .*remove_hooks\(model\) first"):
        move(loaded[0])
    assert all(p.is_meta for p in loaded.parameters())


def test_weight_that_only_is_read_in_place_of_another_is_not_written_to(tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.zeros(4, 4, dtype=torch.float64).add_(loaded[0].weight), plain[0].weight)
