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


def goes_on(one: Trained, alone: Trained) -> None:
    """Parameters, moments, steps, rates and the place in the data: the second half is as if never interrupted."""
    assert len(one.norms) == len(alone.norms) // 2
    assert difference(one.losses, alone.losses[len(alone.losses) - len(one.losses) :]) <= 1e-5
    worst = max(difference(one.weights[name], alone.weights[name]) for name in alone.weights)
    assert worst <= 2e-4, worst


def all_jobs(jobs: dict[str, Job]) -> dict[str, Trained]:
    return {name: train(job) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def two(alone: tuple[Trained, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Trained]]:
    """What two ranks trained; test_same_numbers.py has the other stages, and those that go on elsewhere."""
    own = tmp_path_factory.mktemp("zero") / "zero.json"
    own.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,'
        ' "gradient_clipping": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",'
        ' "stage3_param_persistence_threshold": 0}}'
    )
    offloaded = DeepSpeed(
        stage=3, config=str(own), offload_optimizer="cpu", offload_param="cpu", activation_checkpointing=True
    )
    jobs = {
        "stage 0": Job(strategy=DeepSpeed(stage=0)),
        "offloaded": Job(strategy=offloaded),
        "stage 1, resumed": Job(strategy=DeepSpeed(stage=1), load=alone[1]),
        "stage 3, resumed": Job(strategy=DeepSpeed(stage=3), load=alone[1]),
    }
    return run_ranks(all_jobs, jobs, num_processes=2)


def test_training_when_nothing_is_divided_is_that_of_one_process(
    two: list[dict[str, Trained]], alone: tuple[Trained, str]
) -> None:
    for told in two:
        agrees(told["stage 0"], alone[0])


def test_training_when_offloaded_and_recomputed_by_a_json_of_the_user_is_the_same(
    two: list[dict[str, Trained]], alone: tuple[Trained, str]
) -> None:
    for told in two:
        agrees(told["offloaded"], alone[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_when_saved_by_one_process_goes_on_under_zero(
    stage: int, two: list[dict[str, Trained]], alone: tuple[Trained, str]
) -> None:
    for told in two:
        goes_on(told[f"stage {stage}, resumed"], alone[0])


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
