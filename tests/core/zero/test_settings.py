"""What DeepSpeed is initialised with, from our options and a configuration of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from torch import nn

from nbaccel import DeepSpeed
from nbaccel.core.plan import size_of
from nbaccel.core.zero.settings import settings
from nbaccel.errors import ConfigError

MODEL = size_of(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))))

EVERYTHING_AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "communication_data_type": "auto",
    "zero_allow_untested_optimizer": "auto",
    "zero_force_ds_cpu_optimizer": "auto",
    "data_types": {"grad_accum_dtype": "auto"},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": "auto"},
    "zero_optimization": {
        "stage": "auto",
        "overlap_comm": "auto",
        "contiguous_gradients": "auto",
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": "auto",
        "sub_group_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
        "offload_optimizer": {"device": "auto", "nvme_path": "auto", "pin_memory": "auto"},
        "offload_param": {"device": "auto", "nvme_path": "auto", "buffer_size": "auto"},
    },
    "aio": {"block_size": "auto"},
}


def settle(options: DeepSpeed, *, stage: int = 3, precision: str = "bf16") -> dict[str, Any]:
    return settings(
        options, stage=stage, size=MODEL, num_processes=2, precision=precision, accumulation=4, clipping=None
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("place", [None, "cpu"])
def test_every_auto_when_filled_is_what_stands_there_without_a_configuration(
    stage: int, place: str | None
) -> None:
    offload = {"offload_optimizer": place, "offload_param": place if stage == 3 else None}
    plain = settle(DeepSpeed(stage=stage, **offload), stage=stage)
    filled = settle(DeepSpeed(stage=stage, config=EVERYTHING_AUTO, **offload), stage=stage)
    assert dict(leaves(filled)) == dict(leaves(plain))
    assert "auto" not in dict(leaves(filled)).values()


def test_configuration_of_the_user_goes_over_ours_and_under_nothing() -> None:
    own = {
        "zero_optimization": {"reduce_bucket_size": 77, "round_robin_gradients": True},
        "wall_clock_breakdown": True,
    }
    found = dict(leaves(settle(DeepSpeed(stage=3, config=own))))
    assert found["zero_optimization.reduce_bucket_size"] == 77
    assert found["zero_optimization.round_robin_gradients"] is True
    assert found["wall_clock_breakdown"] is True
    assert found["gradient_clipping"] == 0.0
    assert found["train_micro_batch_size_per_gpu"] == 1


def test_options_when_given_are_deepspeed_s() -> None:
    options = DeepSpeed(
        stage=3,
        overlap_comm=True,
        communication_dtype="bf16",
        reduce_bucket_size=10,
        allgather_bucket_size=20,
        prefetch_bucket_size=30,
        max_live_parameters=40,
        param_persistence_threshold=50,
        leaf_modules=["Linear"],
    )
    found = dict(leaves(settle(options)))
    zero = {name.removeprefix("zero_optimization."): value for name, value in found.items()}
    assert found["communication_data_type"] == "bf16"
    assert zero["overlap_comm"] is True
    assert zero["reduce_bucket_size"] == 10
    assert zero["allgather_bucket_size"] == 20
    assert zero["stage3_prefetch_bucket_size"] == 30
    assert zero["stage3_max_live_parameters"] == 40
    assert zero["stage3_param_persistence_threshold"] == 50
    assert zero["leaf_module.classes"] == ["Linear"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 2, "prefetch_bucket_size": 5}, "prefetch_bucket_size needs stage=3"),
        ({"stage": 1, "leaf_modules": ["Expert"]}, "leaf_modules needs stage=3"),
        ({"stage": 3, "leaf_modules": "Expert"}, "a list of names"),
        ({"stage": 3, "reduce_bucket_size": 0}, "reduce_bucket_size is 0"),
        ({"stage": 2, "allgather_bucket_size": 9}, "allgather_bucket_size is 9; it must be an even number"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "needs nvme_path"),
    ],
)
def test_options_when_they_cannot_be_honoured_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DeepSpeed(**options)


def test_gathering_when_odd_in_the_file_is_refused() -> None:
    own = {"zero_optimization": {"allgather_bucket_size": 77}}
    with pytest.raises(ConfigError, match="allgather_bucket_size is 77; DeepSpeed takes an even number"):
        settle(DeepSpeed(stage=2, config=own), stage=2)
