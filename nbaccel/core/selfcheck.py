"""A small training whose numbers are known to agree however many ranks do it: for `nbaccel test`."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core.accelerator import Accelerator

__all__ = ["GLOBAL_BATCH", "train"]

GLOBAL_BATCH = 8
_SAMPLES = 53  # a prime: the last batch is short, and uneven over the ranks


def train(mixed_precision: str | None = None, accumulation: int | None = None) -> dict[str, object]:
    """Train two passes; this rank's losses, the model's checksum, and where it ran."""
    acc = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation, seed=3)
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x = torch.randn(_SAMPLES, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True).tanh())
    micro = GLOBAL_BATCH // acc.num_processes // (accumulation or 1)
    loader = DataLoader(data, batch_size=micro, shuffle=True)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    losses: list[float] = []
    for _ in range(2):
        total, count = torch.zeros((), device=acc.device), 0
        for inputs, targets in loader:
            with acc.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                acc.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach().float() * loader.batch_samples
            count += loader.global_batch_samples
        losses.append((acc.reduce(total) / count).item())
    weights = torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])
    return {
        "rank": acc.process_index,
        "size": acc.num_processes,
        "device": str(acc.device),
        "losses": losses,
        "norm": weights.norm().item(),
    }
