"""Accelerate's own arguments of the functions for models larger than memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nbaccel.compat.accelerate as accelerate
from nbaccel.compat.accelerate import big_modeling as compat
from nbaccel.errors import ConfigError
from tests.core.offload.models import linears, saved

X = torch.ones(2, 4)


def test_model_when_dispatched_with_accelerates_arguments_answers_as_before(tmp_path: Path) -> None:
    for call in (
        lambda m: compat.dispatch_model(m, {"": "disk"}, offload_dir=str(tmp_path)),
        lambda m: compat.dispatch_model(m, {"": "cpu"}, "cpu", force_hooks=True, skip_keys="past_key_values"),
        lambda m: compat.dispatch_model(
            m, {"": CPU}, main_device=CPU, offload_buffers=True, preload_module_classes=["Linear"]
        ),
        lambda m: compat.disk_offload(m, str(tmp_path), CPU, offload_buffers=True),
        lambda m: compat.disk_offload(m, offload_dir=tmp_path),
        lambda m: compat.cpu_offload(m, CPU, True),
    ):
        model = linears()
        wanted = model(X)
        assert torch.equal(call(model)(X), wanted)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_map": {"": "cpu"}, "offload_state_dict": True, "skip_keys": ["x"]},
        {"device_map": "balanced_low_0"},
        {"device_map": None, "offload_buffers": True, "full_state_dict": True},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}, "dtype": "torch.float32", "strict": True},
    ],
)
def test_checkpoint_when_loaded_with_accelerates_arguments_is_the_model(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = linears()
    path = saved(model, tmp_path / "model.safetensors")
    assert torch.equal(compat.load_checkpoint_and_dispatch(linears(), path, **options)(X), model(X))


def test_checkpoint_when_loaded_without_a_map_makes_a_plain_model(tmp_path: Path) -> None:
    path = saved(linears(), tmp_path / "model.safetensors")
    with compat.init_empty_weights():
        model = linears()
    compat.load_checkpoint_and_dispatch(model, path, dtype="bfloat16")
    assert type(model) is nn.Sequential
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_when_they_are_elsewhere_are_refused() -> None:
    with pytest.raises(ConfigError, match="state_dict does not exist here"):
        compat.cpu_offload(linears(), state_dict={})
    with pytest.raises(ConfigError, match="offload_index does not exist here"):
        compat.dispatch_model(linears(), {"": "cpu"}, offload_index={})
    with pytest.raises(ConfigError, match="give offload_dir"):
        compat.disk_offload(linears())


def test_first_device_when_it_is_to_be_kept_free_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "accelerators", lambda: ["cuda:0", "cuda:1"])
    with pytest.raises(ConfigError, match="balanced_low_0"):
        compat.dispatch_model(linears(), "balanced_low_0")


def test_map_when_asked_with_accelerates_arguments_is_that_of_the_limits() -> None:
    sizes = {"dtype": "float16", "special_dtypes": {"0.weight": "torch.float32"}}
    how = {"verbose": True, "clean_result": True, "offload_buffers": False, "fallback_allocation": True}
    # 4 x 4 + 4 numbers, of 2 bytes each; the first weight's are of 4
    assert accelerate.infer_auto_device_map(linears(), {"cpu": 112}, [], **sizes, **how) == {"": "cpu"}
    assert accelerate.infer_auto_device_map(linears(), {"cpu": 111}, [], **sizes, **how)["1"] == "disk"
