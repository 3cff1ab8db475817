"""Layers divided over ranks, one forward and one backward at a time: the numbers of one process."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, WIDTH, Block, difference
from torch import nn

from nbaccel import Pipeline
from nbaccel.errors import ConfigError

pytestmark = pytest.mark.timeout(300)
STEPS = 10


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Scale(nn.Module):
    """Something with a buffer, on the last rank."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def model() -> nn.Sequential:
    torch.manual_seed(7)
    layers = {"embedding": nn.Embedding(VOCABULARY, WIDTH), **{f"block{i}": Block() for i in range(3)}}
    return nn.Sequential(OrderedDict({**layers, "scale": Scale(), "head": nn.Linear(WIDTH, VOCABULARY)}))


def train(
    strategy: Any, save: str | None = None, load: str | None = None, precision: str = "no"
) -> dict[str, Any]:
    """AdamW in two groups, a schedule and clipping. The last batch is a small one."""
    from nbaccel import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision, verify=True)
    net: Any = model()
    if acc.process_index:
        with torch.no_grad():
            net.head.weight.zero_()  # rank 0's values count
    heads = list(net.head.parameters())
    rest = [p for name, p in net.named_parameters() if not name.startswith("head")]
    optimizer: Any = torch.optim.AdamW([{"params": heads, "lr": 0.02}, {"params": rest}], lr=0.01)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    tokens = torch.randint(VOCABULARY, (8 * STEPS - 2, 7), generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
    loader: Any = torch.utils.data.DataLoader(data, batch_size=8 // acc.strategy.data_axis.size)
    net, optimizer, loader, schedule = acc.prepare(net, optimizer, loader, schedule)
    if load:
        acc.load_state(load)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for inputs, targets in loader:
        if acc.strategy.name == "pipeline":
            loss = acc.pipeline_step((inputs, targets))
        else:
            loss = cross_entropy(net(inputs), targets)
            acc.backward(loss)
        found["norms"].append(float(acc.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found["losses"].append(acc.reduce(loss.detach(), "mean").item())
        if save and acc.steps == STEPS // 2:
            acc.save_state(save)
    net.eval()
    with torch.no_grad():
        if acc.strategy.name == "pipeline":
            found["evaluated"] = acc.pipeline_step((tokens[:8, :-1], tokens[:8, 1:])).item()
        else:
            found["evaluated"] = cross_entropy(net(tokens[:8, :-1]), tokens[:8, 1:]).item()
    found["own"] = sorted({name.partition(".")[0] for name, _ in net.named_parameters()})
    found["held"] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    found["state"] = {k: v.float().flatten().tolist() for k, v in acc.get_state_dict(net).items()}
    return found


def agrees(one: dict[str, Any], alone: dict[str, Any]) -> None:
    count = len(one["losses"])
    assert difference(one["losses"], alone["losses"][-count:]) <= 1e-5
    assert difference(one["norms"], alone["norms"][-count:]) <= 1e-4
    assert abs(one["evaluated"] - alone["evaluated"]) <= 1e-5
    assert one["state"].keys() == alone["state"].keys()
    assert max(difference(one["state"][name], alone["state"][name]) for name in alone["state"]) <= 2e-4


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = str(tmp_path_factory.mktemp("alone") / "middle")
    return train("single", save=folder), folder


def on_two_ranks(folder: str, theirs: str) -> list[Any]:
    return [
        train(Pipeline(loss=cross_entropy, split=["block2"]), save=folder),
        train(Pipeline(loss=cross_entropy, microbatches=8), load=theirs),
        train(Pipeline(loss=cross_entropy), precision="bf16"),
        refusals(),
    ]


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_training_when_layers_are_divided_is_that_of_one_process_and_checkpoints_move(
    alone: tuple[dict[str, Any], str], tmp_path: Any
) -> None:
    folder = str(tmp_path / "middle")
    half = train("single", precision="bf16")
    ranks = run_ranks(on_two_ranks, folder, alone[1])
    for rank, (one, resumed, narrow, said) in enumerate(ranks):
        agrees(one, alone[0])
        assert len(one["losses"]) == STEPS
        agrees(resumed, alone[0])
        assert len(resumed["losses"]) == STEPS // 2
        assert difference(narrow["losses"], half["losses"]) <= 2e-3
        assert one["own"] == [["block0", "block1", "embedding"], ["block2", "head"]][rank]
        check_refusals(said)
    assert sum(rank[0]["held"] for rank in ranks) == alone[0]["held"]
    agrees(train("single", load=folder), alone[0])


def test_training_when_there_are_copies_averages_over_them(alone: tuple[dict[str, Any], str]) -> None:
    for one in run_ranks(train, Pipeline(loss=cross_entropy, size=2), num_processes=4):
        assert difference(one["losses"][:-1], alone[0]["losses"][:-1]) <= 1e-5
        assert max(difference(one["state"][n], alone[0]["state"][n]) for n in one["state"]) <= 1e-3


def test_pipeline_when_there_is_one_process_is_refused() -> None:
    from nbaccel import Accelerator

    with pytest.raises(ConfigError, match="at least two ranks"):
        Accelerator(cpu=True, strategy=Pipeline(loss=cross_entropy))


def refusals() -> list[str]:
    from nbaccel import Accelerator

    said = []

    def refused(do: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            do()
        said.append(str(caught.value))

    good = Pipeline(loss=cross_entropy)
    acc = Accelerator(cpu=True, strategy=good)
    tied = model()
    tied.head.weight = tied.embedding.weight
    refused(lambda: Accelerator(cpu=True, strategy="pipeline"))
    refused(lambda: Accelerator(cpu=True, strategy=good, gradient_accumulation_steps=2))
    refused(lambda: Accelerator(cpu=True, strategy=Pipeline(loss=cross_entropy, size=3)))
    refused(lambda: acc.prepare(Block()))
    refused(lambda: acc.prepare(tied))
    refused(
        lambda: Accelerator(cpu=True, strategy=Pipeline(loss=cross_entropy, split=["x"])).prepare(model())
    )
    refused(lambda: acc.backward(torch.zeros(1, requires_grad=True).sum()))
    refused(lambda: Accelerator(cpu=True).pipeline_step(None))
    net = acc.prepare(model())
    refused(lambda: acc.pipeline_step({"x": 1}))
    refused(lambda: acc.no_sync(net))
    return said


def check_refusals(said: list[str]) -> None:
    words = [
        "Pipeline(loss=",
        "microbatches",
        "a divisor",
        "nn.Sequential",
        "untie them",
        "embedding, block0",
        "pipeline_step((inputs, targets))",
        "strategy is 'ddp'",
        "a pair of tensors",
        "no_sync",
    ]
    for text, word in zip(said, words, strict=True):
        assert word in text


def counted(strategy: Any) -> dict[str, torch.Tensor]:
    """The statistics of a batch norm after two batches."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2))
    net, optimizer = acc.prepare(layers, torch.optim.SGD(layers.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    for _ in range(2):
        if isinstance(strategy, Pipeline):
            acc.pipeline_step((inputs, targets))
        else:
            acc.backward(nn.functional.mse_loss(net(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value for name, value in acc.get_state_dict(net).items() if name.startswith("1.")}


def test_batch_norm_in_a_pipeline_has_seen_the_batches_there_were() -> None:
    (alone,) = run_ranks(counted, "single", num_processes=1)
    for found in run_ranks(counted, Pipeline(loss=nn.functional.mse_loss, microbatches=1)):
        for name, value in alone.items():
            assert torch.allclose(found[name], value, atol=1e-5), name
