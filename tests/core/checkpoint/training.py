"""A small training state for the checkpoint tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbaccel.core.checkpoint import Contents, ModelState, OptimizerState
from nbaccel.core.world import World, join


class Counter:
    """A user's own object."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


class Training:
    """A model, its optimizer and scheduler, and a counter; `steps(n)` trains on deterministic data."""

    def __init__(
        self, world: World | None = None, *, seed: int = 0, width: int = 16, tied: bool = False
    ) -> None:
        self.world = world or join()
        torch.manual_seed(seed)
        self.bare = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8))
        if tied:
            self.bare.append(nn.Linear(8, 8))
            self.bare.append(nn.Linear(8, 8))
            self.bare[4].weight = self.bare[3].weight
        self.model = DistributedDataParallel(self.bare) if self.world.size > 1 else self.bare
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.counter = Counter()

    @property
    def contents(self) -> Contents:
        return Contents(
            sharded={
                "model": ModelState(self.model),
                "optimizer": OptimizerState(self.optimizer, [self.model]),
            },
            shared={"scheduler": self.scheduler, "counter": self.counter},
        )

    def steps(self, number: int) -> float:
        loss = torch.tensor(0.0)
        for _ in range(number):
            generator = torch.Generator().manual_seed(self.counter.value)
            x = torch.randn(6, 8, generator=generator)
            loss = (self.model(x) - x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.counter.value += 1
        return loss.item()

    def numbers(self) -> dict[str, torch.Tensor]:
        """Everything training depends on, copied."""
        state = {f"model.{k}": v.clone() for k, v in self.bare.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            state.update((f"optimizer.{i}.{k}", v.clone()) for k, v in values.items())
        state["lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"])
        state["counter"] = torch.tensor(self.counter.value)
        return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
