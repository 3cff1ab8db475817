"""ZeRO on real ranks: the numbers of one process, and checkpoints that move to and from other strategies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from tiny import Job, Trained, difference, train

from nbaccel import DeepSpeed
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]


def agrees(one: Trained, alone: Trained, tolerance: float = 1e-5) -> None:
    assert difference(one.losses, alone.losses) <= tolerance
    assert difference(one.norms, alone.norms) <= 5 * tolerance
    assert one.weights.keys() == alone.weights.keys()
    worst = max(difference(one.weights[name], alone.weights[name]) for name in alone.weights)
    assert worst <= 20 * tolerance, worst
    assert one.tied


@pytest.mark.parametrize("stage", [0, 2])
def test_training_when_zero_shards_is_that_of_one_process(stage: int, alone: tuple[Trained, str]) -> None:
    for one in run_ranks(train, Job(strategy=DeepSpeed(stage=stage)), num_processes=2):
        agrees(one, alone[0])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trained], str]:
    """Stage 3 on four ranks, and the checkpoint of the middle."""
    folder = str(tmp_path_factory.mktemp("zero") / "middle")
    return run_ranks(train, Job(strategy=DeepSpeed(stage=3), save=folder), num_processes=4), folder


def goes_on(one: Trained, alone: Trained) -> None:
    """Parameters, moments, steps, rates and the place in the data: the second half is as if never interrupted."""
    assert len(one.norms) == len(alone.norms) // 2
    assert difference(one.losses, alone.losses[len(alone.losses) - len(one.losses) :]) <= 1e-5
    worst = max(difference(one.weights[name], alone.weights[name]) for name in alone.weights)
    assert worst <= 2e-4, worst


def test_training_when_four_ranks_share_everything_is_that_of_one_process(
    four: tuple[list[Trained], str], alone: tuple[Trained, str]
) -> None:
    for one in four[0]:
        agrees(one, alone[0])


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [(DeepSpeed(stage=3), 2), ("ddp", 2), ("single", 1)],
    ids=["zero-3", "ddp", "one process"],
)
def test_checkpoint_when_saved_by_zero_3_goes_on_elsewhere(
    strategy: object, num_processes: int, four: tuple[list[Trained], str], alone: tuple[Trained, str]
) -> None:
    for one in run_ranks(train, Job(strategy=strategy, load=four[1]), num_processes=num_processes):
        goes_on(one, alone[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_when_saved_by_one_process_goes_on_under_zero(
    stage: int, alone: tuple[Trained, str]
) -> None:
    for one in run_ranks(train, Job(strategy=DeepSpeed(stage=stage), load=alone[1]), num_processes=2):
        goes_on(one, alone[0])


def test_training_when_offloaded_and_recomputed_by_a_json_of_the_user_is_the_same(
    alone: tuple[Trained, str], tmp_path
) -> None:
    own = tmp_path / "zero.json"
    own.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,'
        ' "gradient_clipping": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",'
        ' "stage3_param_persistence_threshold": 0}}'
    )
    options = DeepSpeed(
        stage=3, config=str(own), offload_optimizer="cpu", offload_param="cpu", activation_checkpointing=True
    )
    for one in run_ranks(train, Job(strategy=options), num_processes=2):
        agrees(one, alone[0])


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_training_when_in_bf16_follows_one_process() -> None:
    (alone,) = run_ranks(train, Job(strategy="single", mixed_precision="bf16"), num_processes=1)
    for one in run_ranks(train, Job(strategy=DeepSpeed(stage=2), mixed_precision="bf16"), num_processes=2):
        assert difference(one.losses, alone.losses) <= 2e-3


def refusals() -> dict[str, str]:
    """What is refused, on each rank, before anything is trained."""
    import torch
    from torch import nn

    from nbaccel import DeepSpeed
    from nbaccel.core import Accelerator
    from nbaccel.errors import ConfigError

    def asked(
        optimizer: object = None, together: bool = True, accumulation: int = 1, **options: object
    ) -> str:
        acc = Accelerator(cpu=True, strategy=DeepSpeed(**options), gradient_accumulation_steps=accumulation)
        model = nn.Linear(2, 2)
        made = (optimizer or torch.optim.AdamW)(model.parameters())
        try:
            if together:
                acc.prepare(model, made)
            else:
                acc.prepare(model)
        except ConfigError as error:
            return str(error)
        return "was taken"

    return {
        "optimizer": asked(torch.optim.Adafactor, stage=3),
        "alone": asked(together=False, stage=2),
        "accumulation": asked(stage=2, config={"gradient_accumulation_steps": 8}, accumulation=2),
        "section": asked(stage=2, config={"optimizer": {"type": "Adam"}}),
    }


def test_wrong_combinations_when_asked_are_refused_with_what_to_do() -> None:
    for found in run_ranks(refusals, num_processes=2):
        assert "Adafactor cannot go with ZeRO" in found["optimizer"]
        assert "strategy 'fsdp'" in found["optimizer"]
        assert "prepare(model, optimizer)" in found["alone"]
        assert (
            "gradient_accumulation_steps is 8 in the DeepSpeed configuration and 2" in found["accumulation"]
        )
        assert "make it in the script" in found["section"]


def odd(strategies: list[object]) -> list[dict[str, list[float]]]:
    """The weights of models whose parameters are few and odd in number, after two steps under each strategy."""
    import warnings

    from torch import nn

    from nbaccel.core import Accelerator

    found = []
    for strategy in strategies:
        weights: dict[str, list[float]] = {}
        for shape in ((3, 3, 1), (1, 1), (5, 7, 3)):
            acc = Accelerator(cpu=True, strategy=strategy)
            torch.manual_seed(7)
            layers = [nn.Linear(ins, outs) for ins, outs in pairwise(shape)]
            model = nn.Sequential(*layers)
            model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
            warnings.simplefilter("error", FutureWarning)  # names of collectives that torch renamed
            for _ in range(2):
                acc.backward(model(torch.ones(2, shape[0])).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
            state = acc.get_state_dict(model)
            weights |= {f"{shape} {name}": one.flatten().tolist() for name, one in state.items()}
        found.append(weights)
    return found


def test_training_when_parameters_are_few_and_odd_in_number_is_that_of_one_process() -> None:
    ((alone,),) = run_ranks(odd, ["single"], num_processes=1)
    for found in run_ranks(odd, [DeepSpeed(stage=stage) for stage in (0, 1, 2, 3)], num_processes=3):
        for weights in found:
            assert weights == {name: pytest.approx(values, abs=1e-5) for name, values in alone.items()}
