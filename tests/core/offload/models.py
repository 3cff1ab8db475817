"""Small models of every kind that is placed differently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nbaccel import init_empty_weights, load_checkpoint_and_dispatch

Inputs = dict[str, Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class TiedLanguageModel(nn.Module):
    """GPT-2's shape: tied table and head, a causal mask as a buffer, positions as a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.randn(12, 16))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.ones(12, 12).tril().bool(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        x = self.wte(ids) + self.positions[:length]
        for block in self.blocks:
            x = block(x, self.mask[:length, :length])
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended, _ = self.attention(x, x, x, attn_mask=~mask, need_weights=False)
        return x + self.mlp(x + attended) * self.scale


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.core = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 30)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(source), self.embed(target)))


class Recurrent(nn.Module):
    """The head's weight is used without calling the head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.register_buffer("shift", torch.arange(5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.lstm(x)[0], self.head.weight, self.head.bias) + self.shift


KINDS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "mlp": (mlp, {"input": torch.linspace(-1, 1, 48).view(3, 16)}),
    "convolutional": (convolutional, {"input": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}),
    "tied": (TiedLanguageModel, {"ids": torch.arange(20).view(2, 10)}),
    "encoder-decoder": (
        EncoderDecoder,
        {"source": torch.arange(12).view(2, 6), "target": torch.arange(8).view(2, 4)},
    ),
    "recurrent": (Recurrent, {"x": torch.linspace(-1, 1, 48).view(2, 3, 8)}),
}


def saved(model: nn.Module, path: Path) -> Path:
    """The model's tensors in a safetensors file, tied ones once."""
    state = model.state_dict()
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    save_file({name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}, path)
    return path


def linears(count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def both(make: Callable[[], nn.Module], folder: Path) -> tuple[Any, Any]:
    """A model in memory, and the same one with every weight converted and brought when it is needed."""
    torch.manual_seed(0)
    plain = make().eval()
    path = saved(plain, folder / f"{len(list(folder.iterdir()))}.safetensors")
    with init_empty_weights():
        empty = make().eval()
    loaded = load_checkpoint_and_dispatch(empty, path, {"": "disk"}, dtype=torch.float64)
    return copy.deepcopy(plain).double(), loaded


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Inputs, torch.Tensor]:
    """A model in memory, what it is given, and what it answers."""
    make, inputs = KINDS[kind]
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        return model, inputs, model(**inputs)
