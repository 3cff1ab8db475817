"""megatron-core's tensor-parallel layers on real gloo ranks: the numbers of a plain model, checkpoints both ways.

megatron-core is not among the packages that are installed for the tests; docs/strategies.md says how to run this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import Megatron

VOCABULARY, WIDTH, STEPS = 12, 16, 6


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + first(self.down(nn.functional.gelu(first(self.up(self.norm(x))))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of each next token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.losses(first(self.head(x))[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def first(output: Any) -> torch.Tensor:
    """megatron-core's layers give (output, bias)."""
    return output[0] if isinstance(output, tuple) else output


def divided() -> Model:
    """The same, of megatron-core's layers."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )

    size = parallel_state.get_tensor_model_parallel_world_size()
    config = ModelParallelConfig(tensor_model_parallel_size=size, use_cpu_initialization=True)
    how: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_normal_}
    model = Model()
    model.embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, **how)
    for block in model.blocks:
        block.up = ColumnParallelLinear(WIDTH, 4 * WIDTH, gather_output=False, **how)
        block.down = RowParallelLinear(
            4 * WIDTH, WIDTH, bias=True, input_is_parallel=True, skip_bias_add=False, **how
        )
    # Not gathered: megatron-core gathers into CUDA memory only.
    model.head = ColumnParallelLinear(WIDTH, VOCABULARY, bias=False, gather_output=False, **how)
    model.losses = vocab_parallel_cross_entropy
    return model


@dataclass(kw_only=True)
class Job:
    strategy: Any
    weights: str
    """A folder of safetensors: every model begins with them."""
    save: str | None = None
    load: str | None = None


@dataclass(kw_only=True)
class Trained:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, list[float]] = field(default_factory=dict)
    held: int = 0
    """Numbers of parameters on this rank."""


def train(job: Job) -> Trained:
    """AdamW in windows of two micro-steps, with clipping; the global batch is the same for every number of copies."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=job.strategy, gradient_accumulation_steps=2)
    model: Any = divided() if isinstance(job.strategy, Megatron) else Model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(VOCABULARY, (8 * STEPS - 4, 6), generator=torch.Generator().manual_seed(1))
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tokens), batch_size=4 // acc.strategy.data_axis.size
    )
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    acc.load_model(model, job.weights)
    if job.load:
        acc.load_state(job.load)
    done = Trained(held=sum(p.numel() for p in model.parameters()))
    for (batch,) in loader:
        with acc.accumulate(model):
            loss = model(batch).mean()
            acc.backward(loss)
            norm = acc.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        share = acc.strategy.data_axis.size / acc.num_processes
        total = acc.reduce(loss.detach() * loader.batch_samples * share)
        done.losses.append((total / loader.global_batch_samples).item())
        if norm is not None:
            done.norms.append(float(norm))
        if job.save and acc.steps == STEPS // 2 and acc.sync_gradients:
            acc.save_state(job.save)
    done.weights = {n: v.flatten().tolist() for n, v in acc.get_state_dict(model).items()}
    return done


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    save_file(Model().state_dict(), folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def alone(weights: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, str]:
    """The plain model in one process, and the checkpoint of its middle."""
    folder = str(tmp_path_factory.mktemp("alone") / "middle")
    return run_ranks(train, Job(strategy="single", weights=weights, save=folder), num_processes=1)[0], folder


def agrees(one: Trained, alone: Trained) -> bool:
    return (
        one.losses == pytest.approx(alone.losses[-len(one.losses) :], abs=1e-5)
        and one.norms == pytest.approx(alone.norms[-len(one.norms) :], abs=5e-5)
        and one.weights.keys() == alone.weights.keys()
        and all(one.weights[n] == pytest.approx(alone.weights[n], abs=2e-4) for n in alone.weights)
    )


@pytest.mark.parametrize(("size", "num_processes"), [(2, 2), (1, 2), (2, 4)])
def test_training_when_megatron_divides_the_layers_is_that_of_a_plain_model(
    size: int, num_processes: int, weights: str, alone: tuple[Trained, str], tmp_path
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    folder = str(tmp_path / "middle")
    job = Job(strategy=Megatron(size=size), weights=weights, save=folder)
    whole = sum(map(len, alone[0].weights.values()))
    for one in run_ranks(train, job, num_processes=num_processes):
        assert agrees(one, alone[0])
        assert (one.held < 0.6 * whole) == (size == 2)
    (moved,) = run_ranks(train, Job(strategy="single", weights=weights, load=folder), num_processes=1)
    assert agrees(moved, alone[0])


def test_checkpoint_when_saved_by_a_plain_model_goes_on_divided(
    weights: str, alone: tuple[Trained, str]
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    for one in run_ranks(train, Job(strategy=Megatron(size=2), weights=weights, load=alone[1])):
        assert agrees(one, alone[0])


def refusals() -> dict[str, str]:
    """What is refused, on each rank."""
    from nbaccel.core import Accelerator
    from nbaccel.errors import ConfigError

    def asked(strategy: Megatron, model: nn.Module | None = None) -> str:
        try:
            acc = Accelerator(cpu=True, strategy=strategy)
            if model is not None:
                acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        except ConfigError as error:
            return str(error)
        return "was taken"

    return {"plain": asked(Megatron(size=2), nn.Linear(2, 2)), "odd": asked(Megatron(size=3))}


def test_megatron_when_it_cannot_be_is_refused_with_what_to_do() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    for found in run_ranks(refusals, num_processes=2):
        assert "has none of megatron-core's tensor-parallel layers" in found["plain"]
        assert "2 ranks cannot be divided into groups of 3" in found["odd"]


def missing() -> str:
    """On each rank, where it is not installed."""
    import sys

    sys.modules["megatron"] = None  # type: ignore[assignment]
    from nbaccel.core import Accelerator
    from nbaccel.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        Accelerator(cpu=True, strategy="megatron")
    return str(caught.value)


def test_megatron_when_it_is_not_installed_says_what_to_install() -> None:
    assert all("pip install megatron-core" in said for said in run_ranks(missing))
