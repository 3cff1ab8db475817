"""What is asked wrongly is said, and what can be understood is."""

from __future__ import annotations

import json
import os
import warnings
from linecache import getline
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from nbaccel import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from nbaccel.errors import CheckpointError, ConfigError
from tests.core.offload.models import saved

CPU = torch.device("cpu")


def test_devices_are_places() -> None:
    assert dispatch_model(nn.Linear(2, 2), {"": CPU}).weight.device == CPU
    assert cpu_offload(nn.Linear(2, 2), CPU).weight.device == CPU
    assert infer_auto_device_map(nn.Linear(2, 2), {CPU: "1GB"}) == {"": "cpu"}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_memory": {"cpu": -1}}, r"max_memory\['cpu'\] is -1"),
        ({"max_memory": {"cpu": True}}, r"max_memory\['cpu'\] is True"),
        ({"max_memory": "8GB"}, "write it by place"),
        ({"mode": "fast"}, "'fast' is no way to place a model"),
        ({"tokens": -5}, "tokens is -5"),
        ({"kv_cache": -5}, "kv_cache is -5"),
        ({"dtype": "float16"}, "'float16' is no type for weights"),
        ({"dtype": torch.int8}, "torch.int8 is no type for weights"),
        ({"special_dtypes": {"nope": torch.float16}}, "special_dtypes names nope"),
        ({"special_dtypes": {"weight": "half"}}, "'half' is no type for weights"),
    ],
)
def test_map_with_a_wrong_option_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        infer_auto_device_map(nn.Linear(4, 4), **options)


def test_models_without_shapes_are_refused(tmp_path: Path) -> None:
    for call in (
        lambda: dispatch_model(nn.Sequential(nn.LazyLinear(4)), {"": "cpu"}),
        lambda: infer_auto_device_map(nn.Sequential(nn.LazyLinear(4)), {"cpu": "1GB"}),
        lambda: load_checkpoint_and_dispatch(
            nn.LazyLinear(4), saved(nn.Linear(4, 4), tmp_path / "m.safetensors")
        ),
    ):
        with pytest.raises(ConfigError, match="call the model once before it is placed"):
            call()


def test_dispatch_with_a_wrong_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing runs on the disk"):
        cpu_offload(nn.Linear(2, 2), "disk")
    with pytest.raises(ConfigError, match="device_map is None"):
        dispatch_model(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no place to the model"):
        dispatch_model(nn.Linear(2, 2), {})
    path = saved(nn.Linear(4, 4), tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="'float16' is no type"):
        load_checkpoint_and_dispatch(nn.Linear(4, 4), path, dtype="float16")  # type: ignore[arg-type]


def test_what_is_no_model_is_refused() -> None:
    for wrong in (None, [nn.Linear(1, 1)], nn.Linear):
        with pytest.raises(ConfigError, match=r"is no model: give a torch\.nn\.Module"):
            infer_auto_device_map(wrong)  # type: ignore[arg-type]


def test_class_that_is_not_divided_may_be_named_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), nn.Linear(100, 100))
    whole = infer_auto_device_map(model[0], {"cpu": 50_000}, "Sequential")
    assert whole == {"": "disk"}


def test_class_that_is_not_divided_may_be_given_itself() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), nn.Linear(100, 100))
    for one in (nn.Sequential, [nn.Sequential], ["Sequential", "NotHere"]):
        assert infer_auto_device_map(model[0], {"cpu": 50_000}, one) == {"": "disk"}
    with pytest.raises(ConfigError, match="holds 3: give classes, or their names"):
        infer_auto_device_map(model, {"cpu": 50_000}, [3])  # type: ignore[list-item]


def test_class_that_is_not_in_the_model_is_said() -> None:
    said = "names Liner, and this Linear has no module of such a class"
    with pytest.warns(UserWarning, match=said) as first:
        infer_auto_device_map(nn.Linear(4, 4), {"cpu": "1GB"}, ["Liner"])
    with pytest.warns(UserWarning, match=said) as second:
        dispatch_model(nn.Linear(4, 4), no_split_module_classes=["Liner"])
    lines = [getline(__file__, one.lineno).split("(")[0].strip() for one in (first[0], second[0])]
    assert lines == ["infer_auto_device_map", "dispatch_model"]


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({0: "cpu"}, r"the device map names 0: write the place of each module by its name"),
        ({"0.weight": "cpu", "1": "cpu"}, "names 0.weight, and 0 is placed as a whole: write '0'"),
        ({"0.weight": "disk", "": "cpu"}, "names 0.weight, and 0 is placed as a whole: write '0'"),
        ({"1.out_proj": "disk", "0": "cpu"}, "names 1.out_proj, and 1 is placed as a whole: write '1'"),
        ({"1.out_proj": "disk"}, "names 1.out_proj, and 1 is placed as a whole: write '1'"),
        ({"0": "cpu"}, "gives no place to 1; add them"),
        ({"0.x.y": "disk", "2": "cpu", "": "cpu"}, "names 0.x.y, and 0 is placed as a whole"),
        ({"2.x": "disk", "": "cpu"}, "names 2.x, which this model does not have"),
    ],
)
def test_map_with_a_wrong_name_is_refused(device_map: dict[Any, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dispatch_model(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), device_map)


def test_map_that_names_a_models_only_tensors_is_refused() -> None:
    with pytest.raises(ConfigError, match="names bias, and the model is placed as a whole: write ''"):
        dispatch_model(nn.Linear(4, 4), {"weight": "cpu", "bias": "cpu"})


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    disk_offload(nn.Linear(4, 4), "~/off", "cpu")
    assert os.listdir(tmp_path / "off")


def test_table_has_the_bytes_of_each_of_a_modules_own_tensors(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(3000))
            self.layer = nn.Linear(10, 10)

    model = dispatch_model(Root(), {"a": "disk", "b": "disk", "layer": "cpu"}, offload_folder=tmp_path)
    sizes = {line.split()[0]: line.split()[1:3] for line in model.device_map_table().splitlines()}
    assert sizes["a"] == ["4.0", "KB"]
    assert sizes["b"] == ["12.0", "KB"]


def test_nothing_is_left_where_a_checkpoint_ends_while_it_is_copied(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no ranks
        dcp.save(nn.Linear(300, 300).state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for file in (tmp_path / "dcp").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:2000])
    with init_empty_weights():
        empty = nn.Linear(300, 300)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint_and_dispatch(
            empty, tmp_path / "dcp", {"": "disk"}, offload_folder=tmp_path / "offload"
        )
    assert not list((tmp_path / "offload").iterdir())


@pytest.mark.parametrize(
    ("weight", "bias", "said"),
    [
        ([-64, 0], [64, 80], "from byte -64 to 0"),
        ([0, 64], [0, 16], "weight begins inside bias"),
        ([0, 64], [80, 64], "from byte 80 to 64"),
        ([0.0, 64.0], [64, 80], "from byte 0.0 to 64.0"),
    ],
)
def test_tensors_that_lie_wrongly_are_named(
    weight: list[float], bias: list[float], said: str, tmp_path: Path
) -> None:
    header = {
        "weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": weight},
        "bias": {"dtype": "F32", "shape": [4], "data_offsets": bias},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(80))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint_and_dispatch(nn.Linear(4, 4), path, {"": "disk"})


@pytest.mark.parametrize("file", [None, 1])
def test_index_that_names_no_file_is_named(file: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
        load_checkpoint_and_dispatch(nn.Linear(4, 4), tmp_path, {"": "disk"})


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_later_types_of_the_format_are_read(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    scale = torch.arange(4, dtype=torch.uint8).view(dtype)
    save_file({"scale": scale, **nn.Linear(4, 4).state_dict()}, tmp_path / "file.safetensors")
    model: Any = nn.Linear(4, 4)
    model.scale = nn.Parameter(torch.zeros(4, dtype=torch.uint8).view(dtype), requires_grad=False)
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"})
    assert torch.equal(model.scale.view(torch.uint8), torch.arange(4, dtype=torch.uint8))
