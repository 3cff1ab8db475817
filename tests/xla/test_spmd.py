"""One process that computes on several XLA devices: what it trains, what it shards, what it saves."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import Accelerator, launch
from nbaccel.errors import ConfigError
from tests.xla.test_upload import watch_uploads

pytestmark = pytest.mark.slow


def parts() -> tuple[Any, Any, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 3, generator=generator))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), data


def step(model: Any, optimizer: Any, features: Any, wanted: Any, backward: Any) -> None:
    backward((model(features) - wanted).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()


def train(folder: str, load: bool) -> tuple[nn.Module, dict[str, str], int]:
    """The model, how it, the optimizer's state and a batch are sharded, and the number of ranks."""
    acc = Accelerator(project_dir=folder)
    uploads = watch_uploads() if acc.device.type == "xla" else []
    model, optimizer, data = parts()
    loader: Any = DataLoader(data, batch_size=8)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    if load:
        acc.load_state(os.path.join(folder, "saved"))
    for features, wanted in loader:
        step(model, optimizer, features, wanted, acc.backward)
    if not load:
        acc.save_state(os.path.join(folder, "saved"))
    if acc.device.type != "xla":
        return model, {}, acc.num_processes
    import torch_xla

    assert copy.deepcopy(model)(features).device == acc.device
    told = torch_xla._XLAC._get_xla_sharding_spec
    weight = model[0].weight
    shardings = {
        "weight": told(weight),
        "bias of 3": told(model[2].bias),
        "state": told(optimizer.state[weight]["exp_avg"]),
        "batch": told(features),
        "uploaded by": ", ".join(sorted(set(uploads))),
    }
    return model, shardings, acc.num_processes


def run(devices: int, *call: Any) -> tuple[nn.Module, dict[str, str], int]:
    options: dict[str, Any] = {"device": "cpu"}
    if devices:
        options = {"device": "tpu", "config": {"xla_spmd": True}, "env": {"CPU_NUM_DEVICES": str(devices)}}
    else:
        options["num_processes"] = 1
    return launch(train, *call, **options).result(timeout=240)[0]  # type: ignore[no-any-return]


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("devices", [2, 4])
def test_one_process_trains_sharded_arrays_and_saves_them_whole(devices: int, tmp_path: Path) -> None:
    model, shardings, ranks = run(devices, str(tmp_path), False)
    assert ranks == 1
    row = f"{{devices=[{devices},1]{','.join(map(str, range(devices)))}}}"
    assert (shardings["weight"], shardings["state"], shardings["batch"]) == (row, row, row)
    assert f"devices=[{devices}" not in shardings["bias of 3"]
    assert shardings["uploaded by"] == "nbaccel-upload_0"
    expected, optimizer, data = parts()
    for features, wanted in DataLoader(data, batch_size=8):
        step(expected, optimizer, features, wanted, torch.Tensor.backward)
    torch.testing.assert_close(flat(model), flat(expected), rtol=0, atol=1e-6)
    if devices == 4:
        return
    again, shardings, _ = run(devices, str(tmp_path), True)
    assert shardings["weight"] == row
    on_cpu, _, _ = run(0, str(tmp_path), True)
    torch.testing.assert_close(flat(again), flat(on_cpu), rtol=0, atol=1e-6)
    assert not torch.allclose(flat(again), flat(model), atol=1e-3)


def test_more_than_one_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="with xla_spmd one process computes on all devices"):
        launch(parts, num_processes=2, device="tpu", config={"xla_spmd": True})
