"""Other libraries' training code in cells of a kernel that has imported them all and runs threads.

One kernel, imports of every library first, as in a notebook that has been used for a while. The functions
are defined in cells, so they travel by value; the ranks should import nothing again.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.kernel, pytest.mark.slow]

IMPORTS = """
import nbaccel
from nbaccel import launch, notebook_launcher
import asyncio, os, sys, threading, time
import matplotlib.pyplot as plt, pandas as pd, sklearn.ensemble, torch, torch.distributed as dist
import torch.nn as nn
from accelerate import Accelerator
from lightning_fabric import Fabric
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
"""
HOSTILE = """
# what a notebook that has been used for a while holds
stop = threading.Event()
ticker = threading.Thread(target=lambda: stop.wait(600), daemon=True)
ticker.start()
torch.set_num_threads(2)
big = torch.ones(400, 400)
product = float((big @ big).sum())
ticks = []
async def tick():
    while True:
        ticks.append(time.monotonic())
        await asyncio.sleep(0.02)
task = asyncio.get_running_loop().create_task(tick())
model = sklearn.ensemble.RandomForestClassifier(4, n_jobs=2).fit([[0], [1]] * 8, [0, 1] * 8)
figure = plt.figure()
plt.close(figure)
"""


@pytest.fixture(scope="module")
def used(kernel: Any) -> Any:
    """A kernel that imported everything after nbaccel, computed with threads and has a task on its loop."""
    kernel.ok(IMPORTS, timeout=170)
    kernel.ok(HOSTILE, timeout=60)
    kernel.ok("notebook_launcher(lambda: None, num_processes=2)", timeout=170)
    return kernel


def value(kernel: Any, code: str, expression: str) -> Any:
    """Run a cell; the value of an expression after it."""
    kernel.ok(code, timeout=150)
    cell = kernel.ok(f"print('VALUE', repr({expression}))")
    return ast.literal_eval(cell.stdout.partition("VALUE ")[2])


def test_ranks_import_nothing_again_when_the_kernel_has_it_all(used: Any) -> None:
    found = value(
        used,
        """
def first_line():
    before = set(sys.modules)
    from accelerate import Accelerator
    from lightning_fabric import Fabric
    from transformers import Trainer
    import pandas, sklearn.ensemble, torchmetrics
    return sorted(set(sys.modules) - before)
values = notebook_launcher(first_line, num_processes=2)
""",
        "list(values)",
    )
    assert found == [[], []]


def test_no_fresh_server_when_imports_set_variables_of_their_own(used: Any) -> None:
    # scikit-learn sets KMP_*, torch._dynamo TORCHINDUCTOR_CACHE_DIR, Fabric PYTORCH_NVML_*: after our import
    cell = used.ok("import torch._dynamo\nnotebook_launcher(lambda: None, num_processes=2)")
    assert "fresh server" not in cell.stderr
    assert value(used, "", "'KMP_INIT_AT_FORK' in os.environ") is True


def test_rank_computes_with_threads_when_the_kernel_did_and_its_loop_runs_on(used: Any) -> None:
    found = value(
        used,
        """
def multiply():
    torch.set_num_threads(2)
    x = torch.ones(400, 400)
    return float((x @ x).sum()), sorted(thread.name for thread in threading.enumerate())
ticks.clear()
run = launch(multiply, num_processes=2)
values = await run
""",
        "(list(values), product, len(ticks), ticker.is_alive(), task.done())",
    )
    values, product, ticks, alive, ended = found
    # the kernel's threads are not there, only the one that answers while the main thread is busy
    assert values == [(product, ["MainThread", "nbaccel-reporter"])] * 2
    assert ticks > 0
    assert alive
    assert not ended


TRAINER = """
def hf(samples, batch, sync=True, seed=0):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=32, max_position_embeddings=16)
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=os.path.join(folder, "out"), per_device_train_batch_size=batch, max_steps=4, seed=0,
        learning_rate=0.05, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, dataloader_num_workers=0)
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return arguments.world_size, trainer.state.global_step, weights
import tempfile
folder = tempfile.mkdtemp()
ids = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(1))
samples = [{"input_ids": row, "labels": row} for row in ids]
"""


def test_trainer_on_two_ranks_equals_one_process_with_the_whole_batch(used: Any, tmp_path: Path) -> None:
    used.ok(TRAINER)
    found = value(
        used,
        """
two = notebook_launcher(hf, args=(samples, 2), num_processes=2)
one = notebook_launcher(hf, args=(samples, 4), num_processes=1)
local = notebook_launcher(hf, args=(samples, 2), num_processes=1)
""",
        "(two[0][:2], two[1][:2], torch.equal(two[0][2], two[1][2]), float((two[0][2] - one[0][2]).abs().max()),"
        " float((two[0][2] - local[0][2]).abs().max()))",
    )
    first, second, equal, from_whole, from_local = found
    assert first == second == (2, 4)
    assert equal
    assert from_whole < 1e-4
    assert from_local > 1e-3  # without synchronised gradients it would be one rank's own


def test_accelerate_script_reduces_and_shards_when_run_in_two_ranks(used: Any) -> None:
    found = value(
        used,
        """
def accelerate_loop():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.arange(16.0).reshape(8, 2) / 16
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    seen = []
    for (batch,) in loader:
        optimizer.zero_grad()
        accelerator.backward(net(batch).square().mean())
        optimizer.step()
        seen += accelerator.gather(batch[:, 0].contiguous()).tolist()
    total = accelerator.reduce(torch.tensor(float(accelerator.process_index + 1)), "sum")
    return (accelerator.num_processes, accelerator.process_index, str(accelerator.distributed_type),
            type(net).__name__, float(total), sorted(int(v * 8) for v in seen),
            accelerator.unwrap_model(net).weight.detach())
values = notebook_launcher(accelerate_loop, (), num_processes=2, mixed_precision=None, use_port="29500",
                           master_addr="127.0.0.1", node_rank=0, num_nodes=1)
""",
        "[v[:-1] for v in values] + [torch.equal(values[0][-1], values[1][-1])]",
    )
    for rank in (0, 1):
        expected = (2, rank, "DistributedType.MULTI_CPU", "DistributedDataParallel", 3.0, list(range(8)))
        assert found[rank] == expected
    assert found[2] is True


def test_fabric_joins_our_ranks_when_told_ddp_and_its_model_comes_back_plain(used: Any) -> None:
    found = value(
        used,
        """
def fabric_loop():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    net = nn.Linear(2, 1)
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.full((1, 2), float(fabric.global_rank + 1))
    fabric.backward(net(x).sum())
    gradient = net.weight.grad.tolist()
    optimizer.step()
    return fabric.world_size, fabric.global_rank, gradient, fabric.all_gather(x.sum()).tolist(), net
values = notebook_launcher(fabric_loop, num_processes=2)
""",
        "[(*rest, type(net).__name__) for *rest, net in values]",
    )
    # Fabric's wrapper of the model stays in the rank
    assert found == [(2, rank, [[1.5, 1.5]], [2.0, 4.0], "Linear") for rank in (0, 1)]


def test_torchmetrics_sums_over_ranks_when_computed(used: Any) -> None:
    found = value(
        used,
        """
def metric():
    dist.init_process_group()
    mean = MeanMetric()
    mean.update(torch.tensor([1.0, 2.0, 3.0]) if dist.get_rank() else torch.tensor([10.0]))
    return float(mean.compute())
values = notebook_launcher(metric, num_processes=2)
""",
        "list(values)",
    )
    assert found == [4.0, 4.0]


def test_notebook_dataset_reaches_loader_workers_when_defined_in_a_cell(used: Any) -> None:
    found = value(
        used,
        """
class Squares(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return helper(i)
def helper(i): return i * i
class Box:
    def __init__(self, items): self.items = items
def collate(items): return Box(items)
def read(context):
    loader = torch.utils.data.DataLoader(Squares(), batch_size=3, num_workers=1, collate_fn=collate,
                                         multiprocessing_context=context, timeout=60)
    boxes = list(loader)
    return [box.items for box in boxes], all(isinstance(box, Box) for box in boxes)
# a forkserver's worker imports torch anew: one rank is enough
values = [list(notebook_launcher(read, args=("fork",), num_processes=2)),
          list(notebook_launcher(read, args=("forkserver",), num_processes=1))]
""",
        "values",
    )
    whole = ([[0, 1, 4], [9, 16, 25]], True)
    assert found == [[whole] * 2, [whole]]


def test_cell_goes_on_when_a_library_call_failed_in_a_rank(used: Any) -> None:
    cell = used.run("""
def broken():
    accelerator = Accelerator(cpu=True)
    net = accelerator.prepare(nn.Linear(2, 1))
    if accelerator.process_index == 1:
        net(torch.ones(1, 3))
    accelerator.wait_for_everyone()
notebook_launcher(broken, num_processes=2)
""")
    assert cell.error == "WorkerError"
    assert "rank 1 of 2 failed" in cell.traceback
    assert "mat1 and mat2 shapes cannot be multiplied" in cell.traceback
    assert "Cell In[" in cell.traceback
    again = used.ok("print(list(notebook_launcher(lambda: 7, num_processes=2)))")
    assert again.stdout.strip() == "[7, 7]"
