"""Every strategy has the numbers of one process on four ranks; its checkpoints go on on two and on one.

Three launches, of four ranks, of two, and of one, train everything there is; the tests compare.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, Job, TinyLM, Trained, difference, train

from nbaccel import FSDP, DeepSpeed, TensorParallel

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
DIVIDED = TensorParallel(plan={"blocks.*.up": "column", "blocks.*.down": "row"})
TWO = TensorParallel(plan=DIVIDED.plan, size=2)
WAYS: dict[str, Any] = {
    "ddp": "ddp",
    "full shard": "fsdp",
    "grad op": FSDP(sharding="shard_grad_op", wrap="Block"),
    "no shard": FSDP(sharding="no_shard"),
    "hybrid": FSDP(sharding="hybrid_shard", shard_size=2, wrap=1000),
    "everything": FSDP(
        wrap=lambda module: type(module).__name__ == "Block",
        cpu_offload=True,
        activation_checkpointing=True,
        forward_prefetch=1,
        backward_prefetch=2,
        reshard_after_forward=True,
    ),
    "divided": DIVIDED,
    "divided in shards": FSDP(tensor_parallel=TWO),
}
if importlib.util.find_spec("deepspeed"):
    WAYS |= {f"zero-{stage}": DeepSpeed(stage=stage) for stage in (1, 2, 3)}
POLICY = FSDP(param_dtype="bfloat16", reduce_dtype="bfloat16", wrap="Block")
HALF = [way for way in WAYS if way not in ("grad op", "no shard", "hybrid", "everything")]
MOVES = [
    (saved, loaded)
    for saved in ("ddp", "full shard", "zero-3")
    for loaded in ("ddp", "full shard", "zero-3")
    if saved != loaded and {saved, loaded} <= WAYS.keys()
]


@dataclass(kw_only=True)
class Told:
    """What one rank of a launch trained."""

    exact: dict[str, Trained] = field(default_factory=dict)
    """In float32, by strategy."""
    half: dict[str, Trained] = field(default_factory=dict)
    """In bf16."""
    resumed: dict[tuple[str, str], Trained] = field(default_factory=dict)
    """By the strategy that four ranks saved under, and the one that went on."""
    policy: Trained = field(default_factory=Trained)
    """Under FSDP2's own options of precision."""
    by_hand: dict[str, tuple[list[float], str]] = field(default_factory=dict)
    """Norms of gradients that `no_sync` accumulated, and what `unwrap_model` gave."""


def accumulated_by_hand(strategy: Any) -> tuple[list[float], str]:
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(7)
    model: Any = TinyLM(2)
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.randint(VOCABULARY, (6, 8, 6), generator=torch.Generator().manual_seed(2))
    axis, norms = acc.strategy.data_axis, []
    for number, batch in enumerate(tokens):
        ends = number % 3 == 2
        with contextlib.nullcontext() if ends else acc.no_sync(model):
            own = batch[axis.rank :: axis.size]
            logits = model(own)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
            acc.backward(loss / 3)
        if ends:
            norms.append(float(acc.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    return norms, type(acc.unwrap_model(model)).__name__


def on_four(folder: str) -> Told:
    return Told(exact={way: train(Job(strategy=one, save=f"{folder}/{way}")) for way, one in WAYS.items()})


def on_two(folder: str) -> Told:
    moves = [*((way, way) for way in WAYS), *MOVES]
    return Told(
        half={way: train(Job(strategy=WAYS[way], mixed_precision="bf16")) for way in HALF},
        resumed={
            (saved, way): train(Job(strategy=WAYS[way], load=f"{folder}/{saved}")) for saved, way in moves
        },
        policy=train(Job(strategy=POLICY)),
        by_hand={way: accumulated_by_hand(one) for way, one in WAYS.items()},
    )


def on_one(folder: str) -> Told:
    return Told(
        exact={"single": train(Job(strategy="single"))},
        half={"single": train(Job(strategy="single", mixed_precision="bf16"))},
        resumed={(way, "single"): train(Job(strategy="single", load=f"{folder}/{way}")) for way in WAYS},
        by_hand={"single": accumulated_by_hand("single")},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("middle")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[Told]:
    return run_ranks(on_four, str(folder), num_processes=4, deadline=400)


@pytest.fixture(scope="module")
def two(folder: Path, four: list[Told]) -> list[Told]:
    return run_ranks(on_two, str(folder), num_processes=2, deadline=400)


@pytest.fixture(scope="module")
def one(folder: Path, four: list[Told]) -> Told:
    return run_ranks(on_one, str(folder), num_processes=1)[0]


@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_one_process(way: str, one: Told, four: list[Told]) -> None:
    alone = one.exact["single"]
    for told in four:
        found = told.exact[way]
        assert difference(found.losses, alone.losses) <= 1e-5
        assert difference(found.norms, alone.norms) <= 5e-5
        assert found.weights.keys() == alone.weights.keys()
        assert max(difference(found.weights[name], alone.weights[name]) for name in alone.weights) <= 2e-4
        assert found.text == alone.text
        assert found.tied


@pytest.mark.parametrize("way", HALF)
def test_training_when_in_bf16_follows_one_process(way: str, one: Told, two: list[Told]) -> None:
    for told in two:
        found = told.half[way].losses
        assert difference(of_steps(found), of_steps(one.half["single"].losses)) <= 2e-3
        assert difference(found, one.exact["single"].losses) > 2e-4, "it was not in bf16"


def of_steps(losses: list[float]) -> list[float]:
    """The loss of each optimizer step: the mean over its micro-steps, in which bf16's rounding is less."""
    size = Job().accumulation
    return [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]


def test_precision_when_it_is_fsdps_own_is_coarser(one: Told, two: list[Told]) -> None:
    for told in two:
        # losses are in bf16 themselves: of 2.5, the last digit is a hundredth
        assert 1e-3 < difference(told.policy.losses, one.exact["single"].losses) < 5e-2


def test_rank_when_fully_sharded_holds_its_share(one: Told, four: list[Told]) -> None:
    for told in four:
        # the rest is padding to whole rows
        assert told.exact["full shard"].held <= one.exact["single"].held * (1 / 4 + 0.15)
        assert told.exact["full shard"].kind == "DTensor"


@pytest.mark.parametrize(("saved", "way"), [*((way, way) for way in WAYS), *MOVES])
def test_checkpoint_of_four_ranks_goes_on_on_two(saved: str, way: str, one: Told, two: list[Told]) -> None:
    for told in two:
        goes_on(told.resumed[saved, way], one.exact["single"])


@pytest.mark.parametrize("saved", WAYS)
def test_checkpoint_of_four_ranks_goes_on_in_one_process(saved: str, one: Told) -> None:
    goes_on(one.resumed[saved, "single"], one.exact["single"])


def goes_on(found: Trained, alone: Trained) -> None:
    """Parameters, moments, steps, rates and the place in the data: the second half is as if never interrupted."""
    assert len(found.norms) == len(alone.norms) // 2
    assert difference(found.losses, alone.losses[len(alone.losses) - len(found.losses) :]) <= 1e-5
    assert max(difference(found.weights[name], alone.weights[name]) for name in alone.weights) <= 2e-4


@pytest.mark.parametrize("way", WAYS)
def test_gradients_when_accumulated_by_no_sync_are_those_of_one_process(
    way: str, one: Told, two: list[Told]
) -> None:
    norms, kind = one.by_hand["single"]
    for told in two:
        assert difference(told.by_hand[way][0], norms) <= 1e-5
        assert kind in told.by_hand[way][1]  # FSDP2 puts its own class before the user's
