from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nbaccel import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from nbaccel.core.offload.parts import parts_of
from nbaccel.errors import CheckpointError
from tests.core.offload.models import saved


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()


class Shared(nn.Module):
    """One buffer under two names, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(4, 4), nn.Module(), nn.Module()
        shift = torch.zeros(4)
        self.first.register_buffer("shift", shift)
        self.second.register_buffer("shift", shift)
        self.register_buffer("frequencies", torch.arange(4.0) / 3, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.second.shift  # type: ignore[no-any-return]


def test_buffer_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    state = {k: v for k, v in normed().state_dict().items() if "running" not in k}
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"missing there: 1\.running_mean, 1\.running_var"):
        load_checkpoint_and_dispatch(normed(), tmp_path, {"": "cpu"}, strict=True)
    with pytest.warns(UserWarning, match=r"has no 1\.running_mean, 1\.running_var: they keep"):
        load_checkpoint_and_dispatch(normed(), tmp_path, {"": "cpu"})
    with init_empty_weights(include_buffers=True):
        empty = normed()
    with pytest.raises(CheckpointError, match=r"missing there: 1\.running_mean, 1\.running_var"):
        load_checkpoint_and_dispatch(empty, tmp_path, {"": "cpu"})


@pytest.mark.parametrize("include_buffers", [True, False])
def test_old_checkpoint_without_counted_batches_is_loaded(include_buffers: bool, tmp_path: Path) -> None:
    plain = normed()
    plain[1].running_mean.fill_(5.0)  # type: ignore[union-attr,operator]
    state = {k: v for k, v in plain.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "file.safetensors")
    with init_empty_weights(include_buffers=include_buffers):
        model: Any = normed()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "cpu"}, strict=True)
    assert torch.equal(model(torch.ones(2, 4)), plain(torch.ones(2, 4)))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("stored", ["first", "second"])
def test_shared_buffer_is_found_by_any_name_and_stays_shared(stored: str, tmp_path: Path) -> None:
    plain: Any = Shared()
    plain.first.shift.fill_(3.0)
    other = {"first": "second", "second": "first"}[stored]
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith(other)}
    save_file(state, tmp_path / "file.safetensors")
    with init_empty_weights():
        model: Any = Shared()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"}, strict=True)
    assert model.first.shift is model.second.shift
    assert torch.equal(model(torch.ones(2, 4)), plain(torch.ones(2, 4)))


def test_buffer_of_a_module_under_another_name_is_found(tmp_path: Path) -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.alias = self.norm

    plain: Any = Alias()
    plain.norm.running_mean.fill_(3.0)
    save_file(
        {k: v for k, v in plain.state_dict().items() if k.startswith("alias")}, tmp_path / "file.safetensors"
    )
    loaded: Any = load_checkpoint_and_dispatch(Alias(), tmp_path, {"": "cpu"})
    assert torch.equal(loaded.norm.running_mean, torch.full((4,), 3.0))


def test_only_buffers_of_the_checkpoint_are_converted_and_counted(tmp_path: Path) -> None:
    saved(Shared(), tmp_path / "file.safetensors")
    model: Any = load_checkpoint_and_dispatch(Shared(), tmp_path, {"": "cpu"}, dtype=torch.bfloat16)
    assert model.first.shift.dtype == torch.bfloat16
    assert model.frequencies.dtype == torch.float32
    held = sum(part.cost.buffer_bytes for part in parts_of(Shared(), dtype=torch.bfloat16))
    assert held == 2 * 4 * 2 + 4 * 4
    assert infer_auto_device_map(Shared(), {"cpu": "1GB"}, dtype=torch.bfloat16) == {"": "cpu"}
