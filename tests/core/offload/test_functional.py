"""torch.func over a model of which every weight is streamed: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from nbaccel.errors import ConfigError
from tests.core.offload.models import both, mlp

Pair = tuple[Any, Any]
X = torch.linspace(-1, 1, 80, dtype=torch.float64).view(5, 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """In memory, and streamed."""
    return both(mlp, tmp_path_factory.mktemp("functional"))


def _of_weights(model: Any) -> Any:
    """Gradients with respect to weights that are handed in, streamed ones as they are."""
    return grad(lambda given: functional_call(model, given, (X,)).sum())(dict(model.named_parameters()))[
        "0.weight"
    ]


def _per_sample(model: Any) -> Any:
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}
    one = grad(lambda weights, x: functional_call(model, weights, (x,)).sum())
    return vmap(one, in_dims=(None, 0))(given, X)["2.weight"]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: vmap(model)(X),
        lambda model: jvp(model, (X,), (X,))[1],
        lambda model: vmap(torch.sum)(model[0].weight),
        lambda model: grad(lambda w: (w * w).sum())(model[0].weight),
        _of_weights,
        _per_sample,
    ],
    ids=["vmap", "jvp", "vmap of a weight", "grad of a weight", "grad of all weights", "per sample"],
)
def test_transformed_model_answers_as_in_memory(run: Callable[[Any], Any], pair: Pair) -> None:
    plain, streamed = pair
    torch.testing.assert_close(run(streamed), run(plain))


def test_gradients_that_come_back_to_streamed_layers_are_refused(pair: Pair) -> None:
    for run in (grad(lambda x: pair[1](x).sum()), jacrev(pair[1])):
        with pytest.raises(ConfigError, match="is streamed: it cannot be trained, and its values are gone"):
            run(X)


def test_writing_to_a_streamed_weight_under_vmap_is_refused(pair: Pair) -> None:
    weight = pair[1][0].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"0\.weight is streamed: what is written to it would be lost"):
        vmap(lambda row: row.mul_(2))(weight)
    weight.requires_grad_(True)


class _Shows(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight


def test_weight_that_is_returned_under_vmap_is_a_copy(tmp_path: Path) -> None:
    plain, streamed = both(lambda: nn.ModuleList([_Shows(16, 4), _Shows(16, 4), _Shows(16, 4)]), tmp_path)
    _, shown = vmap(streamed[0], out_dims=(0, None))(X)
    for layer in streamed:  # whose weights come into the same memory
        layer(X)
    assert torch.equal(shown, plain[0].weight)


def test_export_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="a model with streamed weights cannot be exported"):
        torch.export.export(pair[1], (X,))
