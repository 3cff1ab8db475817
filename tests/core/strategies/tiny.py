"""A tiny language model with tied embeddings, and one training loop that every strategy runs unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH, STEPS = 13, 16, 4


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class TinyLM(nn.Module):
    def __init__(self, blocks: int = 3, width: int = WIDTH, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(kw_only=True)
class Job:
    """What `train` is to do."""

    strategy: Any = None
    mixed_precision: str = "no"
    accumulation: int = 2
    steps: int = STEPS
    save: str | None = None
    """Saved to after half of the steps."""
    load: str | None = None
    """Loaded from before the first step; the steps before it are not made."""
    clip: float = 0.5


@dataclass(kw_only=True)
class Trained:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, list[float]] = field(default_factory=dict)
    held: int = 0
    """Bytes of parameters, gradients and optimizer state on this rank at the end of a step."""
    tied: bool = False
    kind: str = ""
    text: list[int] = field(default_factory=list)
    """What the trained model writes."""


def train(job: Job) -> Trained:
    """AdamW, a schedule, accumulation and clipping; the global batch is the same for every world size."""
    from nbaccel.core import Accelerator

    acc = Accelerator(
        cpu=True,
        strategy=job.strategy,
        mixed_precision=job.mixed_precision,
        gradient_accumulation_steps=job.accumulation,
    )
    torch.manual_seed(7)
    model = TinyLM(2)
    with torch.no_grad():
        model.embedding.weight.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (8 * job.accumulation * job.steps - 4, 6), generator=generator)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tokens), batch_size=8 // acc.strategy.data_axis.size
    )
    model, optimizer, loader, schedule = acc.prepare(model, optimizer, loader, schedule)
    if job.load:
        acc.load_state(job.load)
    done = Trained(kind=type(next(model.parameters())).__name__)
    for (batch,) in loader:
        with acc.accumulate(model):
            logits = model(batch)[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            acc.backward(loss)
            norm = acc.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
            if acc.sync_gradients:
                done.held = held_bytes(model, optimizer)
            schedule.step()
            optimizer.zero_grad()
        part = loss.detach() * loader.batch_samples * acc.strategy.data_axis.size / acc.num_processes
        total = acc.reduce(part) / loader.global_batch_samples
        done.losses.append(total.item())
        if norm is not None:
            done.norms.append(float(norm))
        if job.save and acc.steps == job.steps // 2 and acc.sync_gradients:
            acc.save_state(job.save)
    state = acc.get_state_dict(model)
    done.weights = {name: value.float().flatten().tolist() for name, value in state.items()}
    inner = acc.unwrap_model(model)
    done.tied = inner.head.weight is inner.embedding.weight
    done.text = written_by(model)
    return done


@torch.no_grad()
def written_by(model: nn.Module, length: int = 6) -> list[int]:
    """The likeliest tokens, one after another."""
    model.eval()
    tokens = torch.ones(1, 1, dtype=torch.int64)
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0].tolist()


def held_bytes(model: nn.Module, optimizer: Any) -> int:
    """What this rank holds of parameters, gradients and moments; tied ones once."""
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    ]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def difference(a: list[float], b: list[float]) -> float:
    """The largest difference; infinite where the lengths differ."""
    return (
        max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
        if len(a) == len(b)
        else float("inf")
    )
