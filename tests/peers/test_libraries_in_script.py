"""The same libraries in a script: `python script.py`, functions of its `__main__`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SCRIPT = '''
"""A user's script: no `if __name__ == "__main__"`, as in a notebook."""
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from nbaccel import notebook_launcher

SCALE = 3.0


class Points(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(index)]) * SCALE


class Result:
    def __init__(self, values):
        self.values = values


def train(workers):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    net = torch.nn.Linear(1, 1)
    # a worker imports all of this anew: one rank has it
    own = {} if accelerator.process_index else {"num_workers": workers, "multiprocessing_context": "forkserver"}
    loader = DataLoader(Points(), batch_size=2, **own)
    net, loader = accelerator.prepare(net, loader)
    seen = [value for batch in loader for value in batch[:, 0].tolist()]
    gathered = [None] * accelerator.num_processes
    dist.all_gather_object(gathered, Result(seen))
    print("saw", len(seen))
    return sorted(value for result in gathered for value in result.values), accelerator.unwrap_model(net)


(first, net), (second, other) = notebook_launcher(
    train, args=(1,), num_processes=2, mixed_precision="no", use_port="29501", monitor_interval=0.5, output="all"
)
assert first == second == [SCALE * i for i in range(8)], (first, second)
assert torch.equal(net.weight, other.weight), "not the same weights"
assert isinstance(net, torch.nn.Linear)
print("DONE", net(torch.ones(1, 1)).shape)
'''


def test_script_trains_with_accelerate_when_run_by_python(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=170, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "get_accelerator" not in line]  # DeepSpeed's word
    assert sorted(lines[:-1]) == ["[rank 0] saw 4", "[rank 1] saw 4"]
    assert lines[-1] == "DONE torch.Size([1, 1])"
    assert "monitor_interval" in done.stderr  # the one warning about what has no meaning here
    assert "Traceback" not in done.stderr
