"""One training function, unchanged, through torchrun and through our launcher: the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig

CONFIGURATIONS = {
    "one rank": (1, {}),
    "ddp bf16": (2, {"mixed_precision": "bf16"}),
    "accumulation": (2, {"gradient_accumulation_steps": 4}),
    "fsdp": (2, {"strategy": "fsdp", "fsdp": {"wrap": ["Linear"]}}),
    "zero-3": (2, {"strategy": "deepspeed", "deepspeed": {"stage": 3}}),
    "auto": (2, {"strategy": "auto"}),
}


def train(global_batch: int = 8) -> list[float]:
    """Knows nothing of how it is run."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from nbaccel.core import Accelerator

    acc = Accelerator()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x = torch.randn(53, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True).tanh())
    loader = DataLoader(data, batch_size=global_batch // acc.num_processes, shuffle=True)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for inputs, targets in loader:
            with acc.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                acc.backward(loss)
                acc.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            weighted = loss.detach() * loader.batch_samples
            losses.append((acc.reduce(weighted) / loader.global_batch_samples).item())
    return losses


def _by_torchrun(num_processes: int, asked: list[dict], tmp_path: Path) -> list[list[list[float]]]:
    """The losses of each rank, for each of what is `asked`, in one launch."""
    out = tmp_path / f"losses-of-{num_processes}-"
    here = Path(__file__).parent
    configs = [
        RunConfig.from_mapping({"device": "cpu", "seed": 1, **one}, place="the environment").to_json()
        for one in asked
    ]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(here)!r})\n"
        "import json, os, warnings; warnings.simplefilter('ignore')\n"
        "from test_configurations import train\n"
        "losses = []\n"
        f"for config in {configs!r}:\n"
        f"    os.environ[{RUN_CONFIG_VARIABLE!r}] = config\n"
        "    losses.append(train())\n"
        f"open({str(out)!r} + os.environ['RANK'], 'w').write(json.dumps(losses))\n"
        "import torch.distributed as dist; dist.destroy_process_group()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}{rank}").read_text()) for rank in range(num_processes)]


def _by_launcher(num_processes: int, options: dict) -> list[list[float]]:
    from nbaccel import notebook_launcher

    values = notebook_launcher(
        train, num_processes=num_processes, device="cpu", seed=1, output="none", **options
    )
    return list(values)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_training_when_run_by_torchrun_and_by_our_launcher_has_the_same_losses(tmp_path):
    found = {}
    for size in (1, 2):
        mine = {name: options for name, (wanted, options) in CONFIGURATIONS.items() if wanted == size}
        told = _by_torchrun(size, list(mine.values()), tmp_path)
        for (name, options), *torchrun in zip(mine.items(), *told, strict=True):
            ours = _by_launcher(size, options)
            assert all(rank == torchrun[0] for rank in [*torchrun, *ours]), (name, torchrun, ours)
            found[name] = torchrun[0]
    assert len(found["one rank"]) == 2 * 7
    # bf16 follows float32 roughly; accumulation takes the first window's losses on the untrained model
    assert found["ddp bf16"] == pytest.approx(found["one rank"], rel=0.1, abs=0.02)
    assert found["ddp bf16"] != found["one rank"]
    for name in ("fsdp", "zero-3", "auto"):
        assert found[name] == pytest.approx(found["one rank"], abs=1e-5), name
    assert found["accumulation"][0] == pytest.approx(found["one rank"][0], abs=1e-6)
