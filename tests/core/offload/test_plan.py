from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbaccel import infer_auto_device_map, init_empty_weights
from nbaccel.core.offload.given import places_given
from nbaccel.core.offload.machine import Machine, Speed
from nbaccel.core.offload.operations import count_operations
from nbaccel.core.offload.parts import parts_of
from nbaccel.core.offload.placing import Mode, plan_placement
from nbaccel.core.offload.plan import Plan, plan_given
from nbaccel.errors import ConfigError
from tests.core.offload.models import TiedLanguageModel, made

FAST = Speed(flops=1e13, memory=1e12, transfer=2e10)
MACHINE = Machine(
    devices={"cpu": Speed(flops=1e11, memory=1e10, transfer=1e10), "cuda:0": FAST, "cuda:1": FAST}, disk=1e9
)
LAYER = 100 * 100 * 4


def stack(layers: int = 10) -> nn.Module:
    with init_empty_weights():
        return nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(layers)))


def bytes_at(plan: Plan, place: str) -> int:
    pairs = zip(plan.parts, plan.places, strict=True)
    return sum(part.cost.num_bytes for part, where in pairs if where == place)


def test_one_entry_when_all_fits() -> None:
    plan = plan_placement(parts_of(stack()), {"cuda:0": 10 * LAYER, "cpu": LAYER}, MACHINE)
    assert plan.device_map == {"": "cuda:0"}
    assert plan.room == 0


def test_even_contiguous_shares_when_all_fits_on_several() -> None:
    plan = plan_placement(parts_of(stack()), {"cuda:0": 9 * LAYER, "cuda:1": 9 * LAYER}, MACHINE)
    assert list(plan.places) == ["cuda:0"] * 5 + ["cuda:1"] * 5


def test_small_accelerator_is_left_out_when_what_is_streamed_does_not_fit_onto_it() -> None:
    limits = {"cuda:0": LAYER // 2, "cuda:1": 6 * LAYER, "cpu": 100 * LAYER}
    plan = plan_placement(parts_of(stack()), limits, MACHINE)
    assert plan.main == "cuda:1"
    assert bytes_at(plan, "cuda:1") == 4 * LAYER
    with pytest.raises(ConfigError, match="has to be on cuda:0"):
        plan_placement(parts_of(stack()), limits, MACHINE, mode="balanced")


def test_slow_accelerator_is_left_out_when_a_pass_is_shorter_without_it() -> None:
    slow = Speed(flops=1e11, memory=1e10, transfer=1e10)
    machine = Machine(devices={**MACHINE.devices, "cuda:0": slow}, disk=1e9)
    parts = parts_of(stack())
    room = {"cuda:0": 20 * LAYER, "cuda:1": 11 * LAYER}
    assert plan_placement(parts, room, machine).device_map == {"": "cuda:1"}
    assert plan_placement(parts, room, MACHINE).places.count("cuda:0") == 5
    assert plan_placement(parts, room, machine, mode="balanced").places.count("cuda:0") == 5
    # what it holds need not be streamed to the fast one
    less = {"cuda:0": 6 * LAYER, "cuda:1": 6 * LAYER, "cpu": 100 * LAYER}
    assert "cpu" not in plan_placement(parts, less, machine).places


def test_what_is_streamed_runs_where_room_is_kept_for_it() -> None:
    plan = plan_placement(parts_of(stack()), {"cuda:0": 2 * LAYER, "cpu": 100 * LAYER}, MACHINE)
    assert (set(plan.places), plan.main, plan.room) == ({"cpu"}, "cuda:0", 2 * LAYER)
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(100, 300, bias=False), *stack(6))
    limits = {"cuda:0": 7 * LAYER, "cuda:1": 3 * LAYER, "cpu": 100 * LAYER}
    plan = plan_placement(parts_of(model), limits, MACHINE)
    where = next(iter(plan.device_map.values()))
    assert where == plan.main, "which is where dispatch_model lets it run"
    assert bytes_at(plan, where) + plan.room <= limits[where]


def test_sequential_fills_one_place_after_the_other() -> None:
    limits = {"cuda:0": 6 * LAYER, "cpu": 3 * LAYER}
    plan = plan_placement(parts_of(stack()), limits, MACHINE, mode="sequential")
    assert list(plan.places) == ["cuda:0"] * 4 + ["cpu"] * 3 + ["disk"] * 3


def test_room_is_kept_for_the_layer_in_flight_and_the_next_one() -> None:
    plan = plan_placement(parts_of(stack()), {"cuda:0": 6 * LAYER, "cpu": 100 * LAYER}, MACHINE)
    assert bytes_at(plan, "cuda:0") == 4 * LAYER
    assert plan.room == 2 * LAYER


def test_room_is_kept_for_the_cache_of_generation() -> None:
    limits = {"cuda:0": 6 * LAYER, "cpu": 100 * LAYER}
    plan = plan_placement(parts_of(stack()), limits, MACHINE, kv_cache=3 * LAYER)
    assert bytes_at(plan, "cuda:0") == 1 * LAYER


def test_a_table_of_embeddings_goes_to_the_disk_first() -> None:
    with init_empty_weights():
        model = nn.Sequential(nn.Embedding(100, 100), nn.Linear(100, 100, bias=False))
    plan = plan_placement(parts_of(model), {"cpu": LAYER}, MACHINE)
    assert plan.device_map == {"0": "disk", "1": "cpu"}
    assert plan.rows[0].seconds < plan.rows[1].seconds, "its rows alone are read"


def test_layers_whose_computing_hides_their_copying_are_streamed_first() -> None:
    class Shift(nn.Module):
        """As large as a layer, without its matrix product."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(100 * 100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with init_empty_weights():
        parts = parts_of(nn.Sequential(nn.Linear(100, 100, bias=False), Shift()))
    parts += parts_of(stack(2))
    limits = {"cuda:0": 3 * LAYER, "cpu": 10 * LAYER}  # one, beside the room for two
    assert list(plan_placement(parts, limits, MACHINE, tokens=1).places) == ["cuda:0", "cpu", "cpu", "cpu"]
    assert list(plan_placement(parts, limits, MACHINE, tokens=10_000).places) == [
        "cpu",
        "cuda:0",
        "cpu",
        "cpu",
    ]


def test_tied_weights_are_counted_once_and_lie_together() -> None:
    model, _, _ = made("tied")
    parts = parts_of(model)
    assert sum(part.cost.num_bytes for part in parts) == sum(p.numel() * 4 for p in model.parameters())
    names = [part.name for part in parts]
    for limit in range(0, 14_000, 700):
        places = plan_placement(parts, {"cpu": limit}, MACHINE).places
        assert places[names.index("wte")] == places[names.index("head")]


def test_tied_parts_follow_the_fastest_place_given() -> None:
    model, _, _ = made("tied")
    parts = parts_of(model)
    places = places_given({"": "disk", "head": "cpu"}, parts, model)
    assert plan_given(parts, places, MACHINE, main="cpu").device_map["wte"] == "cpu"


def test_bytes_are_those_of_the_wanted_type() -> None:
    model = stack(2)
    assert [p.cost.num_bytes for p in parts_of(model, dtype=torch.bfloat16)] == [LAYER // 2] * 2
    assert [p.cost.num_bytes for p in parts_of(model, special_dtypes={"0.weight": torch.float64})] == [
        2 * LAYER,
        LAYER,
    ]


def test_classes_that_are_not_to_be_split_stay_whole() -> None:
    model, _, _ = made("tied")
    names = [part.name for part in parts_of(model, no_split=["Block"])]
    assert names == ["", "wte", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    model._no_split_modules = ["Block"]
    assert [part.name for part in parts_of(model)] == names


def test_buffers_count_where_their_part_runs() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1000), nn.Linear(100, 100, bias=False))
    part = parts_of(model)[0]
    assert (part.cost.num_bytes, part.cost.buffer_bytes) == (8000, 8008)
    limits = {"cuda:0": 2 * LAYER + 8007, "cpu": 10**6}
    plan = plan_placement(parts_of(model), limits, MACHINE)
    assert bytes_at(plan, "cuda:0") + 8008 <= limits["cuda:0"]


@pytest.mark.parametrize("mode", ["auto", "sequential"])
def test_buffers_of_what_is_on_the_disk_count_where_it_runs(mode: Mode) -> None:
    parts = parts_of(nn.Sequential(nn.Linear(100, 100, bias=False), nn.BatchNorm1d(1000)))
    limits = {"cpu": LAYER + 8007}
    plan = plan_placement(parts, limits, MACHINE, mode=mode)
    assert bytes_at(plan, "cpu") + 8008 <= limits["cpu"]


def test_too_little_memory_says_what_does_not_fit_and_by_how_much() -> None:
    with pytest.raises(ConfigError, match=r"0 takes 40\.0 KB and has to be on cuda:0 .*: 10\.0 KB short"):
        plan_placement(parts_of(stack()), {"cuda:0": LAYER - 10_000, "cpu": 10**9}, MACHINE)
    with pytest.raises(
        ConfigError, match=r"7, 8, 9: 120\.0 KB fit nowhere, 80\.0 KB more than disk has left"
    ):
        plan_placement(parts_of(stack()), {"cpu": 7 * LAYER, "disk": LAYER}, MACHINE)
    with pytest.raises(ConfigError, match="fit nowhere"):
        plan_placement(parts_of(stack()), {"cpu": LAYER, "disk": 0}, MACHINE, mode="sequential")


def test_device_map_of_the_user_is_checked() -> None:
    model, _, _ = made("tied")
    parts = parts_of(model)
    with pytest.raises(ConfigError, match=r"no place to .*norm"):
        places_given({"blocks": "cpu", "wte": "cpu"}, parts, model)
    with pytest.raises(ConfigError, match="names nothing, which this model does not have"):
        places_given({"": "cpu", "nothing": "disk"}, parts, model)
    with pytest.raises(ConfigError, match="cuda:7 is not here"):
        infer_auto_device_map(model, {7: "1GB"})
    with pytest.raises(ConfigError, match=r"max_memory\['cpu'\] is 'much'"):
        infer_auto_device_map(model, {"cpu": "much"})


def test_a_map_may_divide_a_class_that_is_whole_otherwise() -> None:
    model = TiedLanguageModel()
    given = {"": "cpu", "blocks.0.mlp": "disk"}
    parts = parts_of(model, no_split=["Block"], divided=given)
    plan = plan_given(parts, places_given(given, parts, model), MACHINE, main="cpu")
    assert plan.device_map["blocks.0.mlp"] == "disk"
    assert plan.device_map["blocks.1"] == "cpu"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    accelerator=st.integers(0, 4000),
    cpu=st.integers(0, 4000),
    mode=st.sampled_from(["auto", "sequential"]),
    tokens=st.sampled_from([1, 1000]),
)
def test_no_limit_is_ever_exceeded(
    sizes: list[int], accelerator: int, cpu: int, mode: str, tokens: int
) -> None:
    with init_empty_weights():
        model = nn.Sequential(*(nn.Linear(1, size, bias=False) for size in sizes))
    parts = parts_of(model)
    limits = {"cuda:0": accelerator, "cpu": cpu} if accelerator else {"cpu": cpu}
    try:
        plan = plan_placement(parts, limits, MACHINE, mode=mode, tokens=tokens)  # type: ignore[arg-type]
    except ConfigError:
        assert accelerator < 4 * max(sizes), "only what is larger than the accelerator can fail to fit"
        return
    assert bytes_at(plan, "cuda:0") + plan.room <= accelerator
    assert bytes_at(plan, "cpu") <= cpu
    streamed = [p.cost.num_bytes for p, where in zip(parts, plan.places, strict=True) if where != "cuda:0"]
    if accelerator:
        assert plan.room >= max(streamed, default=0)
    places = places_given(plan.device_map, parts, model)
    assert places == list(plan.places), "the map, as short as it is, says the same"


def test_inferred_map_is_made_for_this_machine() -> None:
    assert infer_auto_device_map(stack(), {"cpu": "1GB"}) == {"": "cpu"}
    assert set(infer_auto_device_map(stack(), {"cpu": 3 * LAYER}).values()) == {"cpu", "disk"}


def test_operations_of_convolutions_when_a_batch_is_given_are_those_of_its_images() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(16 * 49, 10)
    )
    parts = parts_of(model)
    assert [part.cost.flops for part in parts] == [2 * 216 * 256, 2 * 1152 * 256, 2 * 7840]
    assert count_operations(parts, model, torch.zeros(5, 3, 16, 16)) == 5
    assert [part.cost.flops for part in parts] == [2 * 216 * 256, 2 * 1152 * 49, 2 * 7840]


def test_operations_when_counted_are_each_part_s_own_and_per_token() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.weight = nn.Parameter(torch.empty(4, 4))
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

        def forward(self, tokens: torch.Tensor, twice: bool = False) -> torch.Tensor:
            x = self.inner(self.table(tokens) @ self.weight)
            return self.inner(x) if twice else x

    with init_empty_weights():
        model = Outer()
    parts = parts_of(model)
    tokens = torch.zeros(3, 7, dtype=torch.int64)
    assert count_operations(parts, model, {"tokens": tokens, "twice": True}) == 21
    assert {part.name: part.cost.flops for part in parts} == {
        "": 32, "table": 0, "inner.0": 2 * 64, "inner.1": 2 * 64
    }  # fmt: skip
    assert not model.inner[0]._forward_hooks, "the model is as it was"
    with pytest.raises(ConfigError, match="Outer cannot be run on the batch"):
        infer_auto_device_map(model, {"cpu": 10**6}, batch=(tokens, True, "more"))


def test_convolution_when_its_computing_hides_the_copy_leaves_the_memory_to_others() -> None:
    linear = nn.Linear(100, 100, bias=False)
    model = nn.Sequential(nn.Conv2d(100, 100, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    large, small = torch.zeros(1, 100, 100, 100), torch.zeros(1, 100, 1, 1)

    def places(batch: torch.Tensor) -> list[str]:
        parts = parts_of(model)
        tokens = count_operations(parts, model, batch)
        return list(plan_placement(parts, {"cpu": LAYER}, MACHINE, tokens=tokens).places)

    assert places(large) == ["disk", "cpu"]
    assert places(small) == ["cpu", "disk"]


def test_encoders_layers_are_placed_one_by_one_and_counted_alike() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).eval()
    parts = parts_of(encoder)
    assert [part.name for part in parts] == ["", "layers.1", "layers.2"], (
        "the first one is there all the time"
    )
    assert count_operations(parts, encoder, torch.ones(2, 5, 8)) == 2
    assert {part.cost.flops for part in parts} == {5 * 2 * (4 * 8 * 8 + 2 * 8 * 16)}
    places = places_given({"layers.0": "disk", "": "cpu"}, parts, encoder)
    assert places == ["disk", "cpu", "cpu"]
    assert plan_given(parts, places, MACHINE, main="cpu").device_map == {
        "layers.0": "disk",
        "layers.1": "cpu",
        "layers.2": "cpu",
    }
