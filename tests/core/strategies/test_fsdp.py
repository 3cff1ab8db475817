"""FSDP2 on real ranks: the numbers of one process, a fraction of its memory, its checkpoints."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tiny import Job, Trained, difference, train

from nbaccel import FSDP

pytestmark = pytest.mark.timeout(300)


def agrees(one: Trained, alone: Trained, tolerance: float = 1e-5) -> None:
    assert difference(one.losses, alone.losses) <= tolerance
    assert difference(one.norms, alone.norms) <= 5 * tolerance
    assert one.weights.keys() == alone.weights.keys()
    worst = max(difference(one.weights[name], alone.weights[name]) for name in alone.weights)
    assert worst <= 20 * tolerance, worst
    assert one.tied


KINDS: dict[str, tuple[int, FSDP]] = {
    "shard grad op": (2, FSDP(sharding="shard_grad_op", wrap="Block")),
    "no shard": (2, FSDP(sharding="no_shard")),
    "hybrid": (4, FSDP(sharding="hybrid_shard", shard_size=2, wrap=1000)),
    "everything": (
        2,
        FSDP(
            wrap=lambda module: type(module).__name__ == "Block",
            cpu_offload=True,
            activation_checkpointing=True,
            forward_prefetch=1,
            backward_prefetch=2,
            reshard_after_forward=True,
        ),
    ),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trained], str]:
    """Full shards on four ranks, and the checkpoint of the middle."""
    folder = str(tmp_path_factory.mktemp("four") / "middle")
    return run_ranks(train, Job(strategy="fsdp", save=folder), num_processes=4), folder


def test_training_when_fully_sharded_is_that_of_one_process_in_a_fourth_of_the_memory(
    four: tuple[list[Trained], str], alone: tuple[Trained, str]
) -> None:
    for one in four[0]:
        agrees(one, alone[0])
        assert one.kind == "DTensor"
    # the rest is padding to whole rows
    assert max(one.held for one in four[0]) <= alone[0].held * (1 / 4 + 0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_training_when_sharded_otherwise_is_that_of_one_process(
    kind: str, alone: tuple[Trained, str]
) -> None:
    num_processes, options = KINDS[kind]
    for one in run_ranks(train, Job(strategy=options), num_processes=num_processes):
        agrees(one, alone[0])
        assert one.kind == "DTensor"


def test_tied_parameters_when_each_is_in_a_block_of_its_own_stay_one(alone: tuple[Trained, str]) -> None:
    options = FSDP(wrap=lambda module: type(module).__name__ in ("Embedding", "Linear"))

    def quietly(job: Job) -> tuple[Trained, list[str]]:
        import warnings

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            return train(job), [str(one.message) for one in said]

    ranks = run_ranks(quietly, Job(strategy=options))
    for one, _ in ranks:
        agrees(one, alone[0])
    assert any("2 of 8 blocks share parameters" in text for text in ranks[0][1])


@pytest.mark.parametrize(("strategy", "num_processes"), [("fsdp", 2), ("ddp", 2), ("single", 1)])
def test_checkpoint_when_saved_by_four_shards_goes_on_elsewhere(
    strategy: str, num_processes: int, four: tuple[list[Trained], str], alone: tuple[Trained, str]
) -> None:
    job = Job(strategy=strategy, load=four[1])
    for one in run_ranks(train, job, num_processes=num_processes):
        goes_on(one, alone[0])


def test_checkpoint_when_saved_whole_goes_on_in_shards(alone: tuple[Trained, str]) -> None:
    for one in run_ranks(train, Job(strategy=FSDP(wrap="none"), load=alone[1]), num_processes=4):
        goes_on(one, alone[0])


def goes_on(one: Trained, alone: Trained) -> None:
    """Parameters, moments, steps, rates and the place in the data: the second half is as if never interrupted."""
    assert len(one.norms) == len(alone.norms) // 2
    assert difference(one.losses, alone.losses[len(alone.losses) - len(one.losses) :]) <= 1e-5
    worst = max(difference(one.weights[name], alone.weights[name]) for name in alone.weights)
    assert worst <= 2e-4, worst


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_training_when_in_bf16_follows_one_process() -> None:
    (alone,) = run_ranks(train, Job(strategy="single", mixed_precision="bf16"), num_processes=1)
    for one in run_ranks(train, Job(strategy="fsdp", mixed_precision="bf16"), num_processes=2):
        assert difference(one.losses, alone.losses) <= 2e-3
