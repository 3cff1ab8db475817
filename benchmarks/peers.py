"""What a notebook says to start ranks with nbaccel and with the launchers it is compared with."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ACCELERATE", "ACCELERATE_DYNAMO", "FABRIC", "HEAVY_IMPORTS", "NBACCEL", "PEERS", "SPAWN", "Peer"]

HEAVY_IMPORTS = "from transformers import Trainer; from sklearn.svm import SVC; import matplotlib.pyplot"

# The functions every launcher runs. `make_group` is the launcher's own way to a process group; each rank leaves
# its times in a file of `folder`, because some launchers bring nothing back.
WORK = '''
def measured(folder, make_group):
    """Imports, process group, one synchronised step; the time of each."""
    import time
    entered = time.monotonic()
    {imports}
    imported = time.monotonic()
    import json, os
    import torch
    import torch.distributed as dist
    given = dist.is_initialized()
    make_group()
    grouped = time.monotonic()
    assert dist.get_world_size() > 1, "not distributed"
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    stepped = time.monotonic()
    rank = dist.get_rank()
    marks = dict(entered=entered, imported=imported, grouped=grouped, stepped=stepped)
    with open(f"{{folder}}/{{rank}}.tmp", "w") as file:
        json.dump(marks, file)
    os.rename(f"{{folder}}/{{rank}}.tmp", f"{{folder}}/{{rank}}.json")
    dist.barrier()
    if not given:
        dist.destroy_process_group()


def nothing():
    pass


def reads(folder, value):
    """Read all of the argument, then stay until the file `go` is there."""
    import json, os, time
    entered = time.monotonic()
    if isinstance(value, list):
        size = sum(len(row["text"]) for row in value)
    else:
        size = 0 if value is None else float(value.sum())
    rank = os.environ["RANK"]
    with open(f"{{folder}}/{{rank}}.tmp", "w") as file:
        json.dump(dict(entered=entered, read=time.monotonic(), size=size), file)
    os.rename(f"{{folder}}/{{rank}}.tmp", f"{{folder}}/{{rank}}.json")
    while not os.path.exists(f"{{folder}}/go"):
        time.sleep(0.02)


def chatters(lines):
    """Print lines of 100 characters as fast as print does."""
    import os
    rank = os.environ["RANK"]
    for number in range(lines):
        print(f"<{{rank}}:{{number:>10}}>" + "x" * 86)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to start ranks from a notebook."""

    name: str
    imports: str
    """The cell that makes it usable; the work's source comes after it."""
    group: str
    """Source of `make_group`."""
    launch: str
    """One statement; {function}, {args} (a tuple's source, with its comma) and {n} are filled in."""
    every: int = 1
    """Takes part in one of so many rounds: the slow ones in fewer."""
    in_file: bool = False
    """Its ranks import the function by name, so it has to be in a file."""

    def setup(self, *, heavy: bool, folder: Path) -> str:
        """The first cell of a notebook that uses this launcher; a file it needs is written to `folder`."""
        # Imported in the kernel too when heavy; `measured` repeats the import as a user's function does.
        work = self.group + WORK.format(imports=HEAVY_IMPORTS if heavy else "pass")
        if self.in_file:
            (folder / "spawned_work.py").write_text(work + SPAWNED_ENTRY)
            work = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom spawned_work import *\n"
        return "\n".join([self.imports, HEAVY_IMPORTS if heavy else "", work])

    def call(self, function: str, args: str, n: int) -> str:
        """The cell that launches `function` on n ranks; `args` is the source of its arguments, with a last comma."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        return self.launch.format(function=function, args=args, n=n, port=port)


_INIT = """
def make_group():
    import torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
"""

NBACCEL = Peer(
    name="nbaccel",
    imports="import torch\nfrom nbaccel import notebook_launcher",
    group=_INIT,
    launch="notebook_launcher({function}, args=({args}), num_processes={n}, device='cpu')",
)
# `Accelerator(cpu=True)` inside the function is what makes its ranks know of one another without a GPU.
ACCELERATE = Peer(
    name="accelerate",
    imports="import torch\nfrom accelerate import Accelerator, notebook_launcher",
    group="def make_group():\n    Accelerator(cpu=True)\n",
    # A port each: its store of one launch can still hold the default one at the next.
    launch="notebook_launcher({function}, args=({args}), num_processes={n}, use_port='{port}')",
)
# The first DistributedDataParallel of a process imports torch._dynamo: with it in the kernel the forks inherit it.
ACCELERATE_DYNAMO = Peer(
    name="accelerate, torch._dynamo imported first",
    imports=ACCELERATE.imports + "\nimport torch._dynamo",
    group=ACCELERATE.group,
    launch=ACCELERATE.launch,
)
FABRIC = Peer(
    name="Fabric `ddp_notebook`",
    imports="""
import torch
from lightning_fabric import Fabric

def without_fabric(fabric, function, *args):
    function(*args)
""",
    group=_INIT,
    launch="Fabric(accelerator='cpu', devices={n}, strategy='ddp_notebook').launch(without_fabric, {function}, {args})",
)
SPAWN = Peer(
    name="`torch.multiprocessing.spawn`",
    imports="import torch, torch.multiprocessing",
    group=_INIT,
    launch="torch.multiprocessing.spawn(enter, args=({n}, {port}, {function}, {args}), nprocs={n})",
    every=3,
    in_file=True,
)
PEERS = (NBACCEL, ACCELERATE, ACCELERATE_DYNAMO, FABRIC, SPAWN)

SPAWNED_ENTRY = """
def enter(rank, n, port, function, *args):
    import os
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(n))
    os.environ.update(LOCAL_RANK=str(rank))
    function(*args)
"""
