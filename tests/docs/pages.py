"""The code blocks of the documentation, and what each page takes for granted before them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

ON_RANKS = {"docs/training.md", "docs/strategies.md"}
"""Pages whose blocks run on ranks: in a session's cells, on two of them."""

FRAGMENTS = {
    "README.md",
    *(f"docs/{name}.md" for name in ("big_models", "cli", "dashboard", "deepspeed", "planner", "sessions")),
    *(f"docs/{name}.md" for name in ("strategies", "tpu")),
    *(f"docs/howto/{name}.md" for name in ("colab", "kaggle", "long_runs")),
}
"""Pages that show parts of a reader's own program, whose model, loader and imports are taken for granted. All others
run in a fresh notebook, from their first block to the last."""

SETUP = """
import torch, nbaccel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from nbaccel import Accelerator, ContextParallel, DeepSpeed, FP8Options, FSDP, LocalSGD, Pipeline, TensorParallel
from nbaccel import notebook_launcher

torch.set_num_threads(1)
torch.manual_seed(0)
loss_fn = loss_function = cross_entropy = nn.functional.mse_loss

class Net(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)

def make_training():
    model, x = Net(), torch.randn(40, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader

model, optimizer, loader = make_training()
opt, sched = optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10)
sample = x = torch.randn(4, 8)
"""
"""Before the first block of a page of fragments."""

FRESH = """
torch.manual_seed(0)
model, optimizer, loader = make_training()
opt, sched = optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10)
"""

BEFORE = {
    ("docs/big_models.md", "load_checkpoint_and_dispatch"): """
from safetensors.torch import save_file
from pathlib import Path
Path("model-folder").mkdir(exist_ok=True)
save_file(Net().state_dict(), "model-folder/model.safetensors")
config, inputs = None, {"x": x}
""",
    ("docs/cli.md", "nbaccel.yaml"): """
open("nbaccel.yaml", "w").write("num_processes: 2\\ndevice: cpu\\n")
def train(): pass
""",
    (
        "docs/dashboard.md",
        "last_run",
    ): "def train(): pass\nnotebook_launcher(train, num_processes=2, device='cpu')",
    ("docs/planner.md", 'strategy="auto"'): FRESH,
    ("docs/sessions.md", "session.run"): """
%nbaccel stop
def function(*args):
    global model
    model = nn.Module()
    model.fc = nn.Linear(2, 2)
args = ()
""",
    ("docs/strategies.md", 'Accelerator(strategy="fsdp")'): """
class LlamaDecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down_proj(self.up_proj(x).relu())
model = nn.Sequential(LlamaDecoderLayer(), LlamaDecoderLayer(), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters())
sched = torch.optim.lr_scheduler.StepLR(opt, 10)
""",
    ("docs/strategies.md", "LlamaForCausalLM"): """
LlamaForCausalLM, config = Net, None
acc = Accelerator(strategy="fsdp")
acc.save_model(acc.prepare(Net()), "folder")
""",
    ("docs/strategies.md", "maybe_context_parallel"): FRESH
    + """
acc = Accelerator()
class PerToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 5)
    def forward(self, tokens):
        return self.linear(tokens.float()[..., None])
cross_entropy = nn.functional.cross_entropy
model = PerToken()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = acc.prepare(model, optimizer, DataLoader(torch.randint(0, 5, (8, 9)), batch_size=2))
""",
    ("docs/strategies.md", "pipeline_step"): FRESH
    + """
model = Net().layers
optimizer = torch.optim.AdamW(model.parameters())
cross_entropy = nn.functional.mse_loss
""",
    ("docs/strategies.md", "LocalSGD"): FRESH
    + """
acc = Accelerator()
model, optimizer, loader = acc.prepare(model, optimizer, loader)
""",
    ("docs/tpu.md", "make_optimizer"): """
def make_model():
    global _model
    _model = nn.Linear(8, 1)
    return _model
def make_optimizer(): return torch.optim.SGD(_model.parameters(), lr=0.1)
def make_loader(): return DataLoader(torch.randn(8, 8), batch_size=2)
""",
    ("README.md", "Accelerator(gradient"): FRESH,
    ("README.md", "train_one_epoch"): "def train_one_epoch(model): return 0.5",
}
"""Before the block of this page that holds this text."""

REPLACED = {
    ("docs/big_models.md", '"cuda:0": "20GB", '): "",
    (
        "docs/strategies.md",
        "model, opt = acc.prepare(model, opt)  # m",
    ): "opt = torch.optim.AdamW(model.parameters())\nmodel, opt = acc.prepare(model, opt)  # m",
    ("docs/cli.md", "notebook_launcher(train, "): "notebook_launcher(train, folder=False, ",
}
"""What is read otherwise: for want of a device, or of what a reader has."""

READ_ONLY = {
    ("docs/tpu.md", "xla_spmd"): "a launch in SPMD mode is refused where there are no chips",
    (
        "docs/deepspeed.md",
        "prepare_inference",
    ): "of a model that generates; tests/core/test_inference.py has one",
    ("docs/strategies.md", "Megatron"): "megatron-core is not installed for the tests",
}
"""Blocks that are compiled and not run, with the reason."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(*found) for found in _FENCE.findall(page.read_text())]


def cells(page: Path) -> list[str]:
    """The page's Python as cells of a notebook."""
    name = name_of(page)
    ranks = "%%ranks\n" if name in ON_RANKS else ""
    found = ["%load_ext nbaccel\n%nbaccel start -n 2 --device cpu"] if ranks else []
    if name in FRAGMENTS:
        found.append(ranks + SETUP)
    for block in blocks(page):
        if block.language != "python":
            continue
        before = [code for (of, text), code in BEFORE.items() if of == name and text in block.code]
        code = block.code
        for (of, text), instead in REPLACED.items():
            code = code.replace(text, instead) if of == name else code
        if any(of == name and text in code for of, text in READ_ONLY):
            compile(code, name, "exec")
            continue
        found += [ranks + one for one in (*before, code) if one.strip()]
    return found
