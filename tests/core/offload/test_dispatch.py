from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nbaccel import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_hooks,
)
from nbaccel.core.offload.dispatched import dispatch_of
from nbaccel.errors import CheckpointError, ConfigError
from tests.core.offload.models import KINDS, Inputs, made, saved

PLACES = ["cpu", "disk", "auto"]


def empty(kind: str) -> nn.Module:
    with init_empty_weights():
        return KINDS[kind][0]().eval()


def device_map(place: str) -> dict[str, object]:
    """The options of a dispatch; "auto" leaves room for about a third on the CPU."""
    if place == "auto":
        return {"device_map": "auto", "max_memory": {"cpu": 1500}}
    return {"device_map": {"": place}}


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_model_from_a_checkpoint_answers_as_in_memory(kind: str, place: str, tmp_path: Path) -> None:
    model, inputs, wanted = made(kind)
    path = saved(model, tmp_path / "model.safetensors")
    before = path.read_bytes()
    loaded = load_checkpoint_and_dispatch(empty(kind), path, **device_map(place))  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(answer(loaded, inputs), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "nothing is written"
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_converted_are_streamed(kind: str, place: str, tmp_path: Path) -> None:
    model, inputs, _ = made(kind)
    path = saved(model, tmp_path / "model.safetensors")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = answer(copy.deepcopy(model).double(), wide)
    loaded = load_checkpoint_and_dispatch(empty(kind), path, dtype=torch.float64, **device_map(place))  # type: ignore[arg-type]
    for _ in range(3):
        assert torch.equal(answer(loaded, wide), wanted)
    streamed = [p for p in loaded.parameters() if p.is_meta]
    assert bool(streamed) == (place != "cpu"), "none of what is on the disk stays in memory"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_model_from_memory_answers_as_before(kind: str, place: str, tmp_path: Path) -> None:
    model, inputs, wanted = made(kind)
    dispatch_model(model, offload_folder=tmp_path, **device_map(place))  # type: ignore[arg-type]
    assert torch.equal(answer(model, inputs), wanted)
    assert len(list(tmp_path.iterdir())) == (place != "cpu")
    for file in tmp_path.iterdir():
        assert load_file(file), "any safetensors reader opens it"


def test_offloading_whole_models(tmp_path: Path) -> None:
    model, inputs, wanted = made("tied")
    assert torch.equal(answer(cpu_offload(copy.deepcopy(model), "cpu"), inputs), wanted)
    assert torch.equal(answer(disk_offload(model, tmp_path, "cpu"), inputs), wanted)


def test_tied_weight_is_stored_and_present_once(tmp_path: Path) -> None:
    model, _, _ = made("tied")
    disk_offload(model, tmp_path, "cpu")
    (file,) = tmp_path.iterdir()
    assert ("wte.weight" in load_file(file)) != ("head.weight" in load_file(file))
    assert model.wte.weight is model.head.weight


def streamed(tmp_path: Path, kind: str = "tied") -> tuple[nn.Module, Inputs, torch.Tensor]:
    """A model whose every weight is converted and brought when it is needed."""
    model, inputs, _ = made(kind)
    path = saved(model, tmp_path / f"{kind}.safetensors")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = answer(copy.deepcopy(model).double(), wide)
    return load_checkpoint_and_dispatch(empty(kind), path, {"": "disk"}, dtype=torch.float64), wide, wanted


def test_state_dict_has_the_real_weights_when_streamed(tmp_path: Path) -> None:
    model, _, _ = made("tied")
    loaded, _, _ = streamed(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    assert state["wte.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert torch.equal(loaded.blocks[1].state_dict()["scale"].float(), model.blocks[1].scale)


@pytest.mark.parametrize("kind", ["tied", "recurrent"])
def test_pickled_and_copied_model_is_plain_and_real(kind: str, tmp_path: Path) -> None:
    loaded, inputs, wanted = streamed(tmp_path, kind)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for made_again in (
        pickle.loads(pickle.dumps(loaded)),
        copy.deepcopy(loaded),
        torch.load(file, weights_only=False),
    ):
        assert type(made_again) is KINDS[kind][0]
        assert not any(module._forward_pre_hooks for module in made_again.modules())
        assert torch.equal(answer(made_again, inputs), wanted)
    assert torch.equal(answer(loaded, inputs), wanted), "the dispatched one is as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_removing_the_hooks_restores_the_plain_model(kind: str, tmp_path: Path) -> None:
    gc.collect()  # models of other tests, and their threads
    threads = threading.active_count()
    loaded, inputs, wanted = streamed(tmp_path, kind)
    answer(loaded, inputs)
    plain = remove_hooks(loaded)
    assert plain is loaded
    assert type(plain) is type(empty(kind))
    assert not [m for m in plain.modules() if m._forward_pre_hooks or m._forward_hooks or m._state_dict_hooks]
    assert {p.device.type for p in plain.parameters()} == {"cpu"}
    assert torch.equal(answer(plain, inputs), wanted)
    plain.float()
    assert next(plain.parameters()).dtype == torch.float32
    assert threading.active_count() <= threads
    assert remove_hooks(plain) is plain


def test_moving_a_dispatched_model_warns_and_does_nothing(tmp_path: Path) -> None:
    loaded, inputs, wanted = streamed(tmp_path)
    for move in (lambda: loaded.to("cpu"), loaded.float, loaded.cuda):
        with pytest.warns(UserWarning, match="is dispatched"):
            move()
    assert torch.equal(answer(loaded, inputs), wanted)


def test_table_says_where_everything_is(tmp_path: Path) -> None:
    model, _, _ = made("tied")
    path = saved(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint_and_dispatch(empty("tied"), path, max_memory={"cpu": 9000})
    lines = loaded.device_map_table().splitlines()
    assert lines[0].split() == ["module", "bytes", "compute", "place", "why"]
    assert any(line.startswith("head ") and "tied to wte" in line for line in lines)
    assert isinstance(loaded, KINDS["tied"][0])


def test_dispatching_twice_is_refused(tmp_path: Path) -> None:
    loaded, _, _ = streamed(tmp_path)
    with pytest.raises(ConfigError, match="remove_hooks"):
        dispatch_model(loaded, {"": "cpu"})
    with pytest.raises(ConfigError, match="remove_hooks"):
        cpu_offload(nn.Sequential(loaded), "cpu")


def test_threads_may_run_the_model_at_once(tmp_path: Path) -> None:
    loaded, inputs, wanted = streamed(tmp_path)
    wrong: list[BaseException | None] = []

    def run() -> None:
        try:
            for _ in range(15):
                assert torch.equal(answer(loaded, inputs), wanted)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert all(p.is_meta for p in loaded.parameters()), "all was given back"


def test_forward_that_raises_gives_everything_back(tmp_path: Path) -> None:
    loaded, inputs, wanted = streamed(tmp_path)
    with pytest.raises(IndexError):
        loaded(torch.full((1, 4), 10**6))
    assert all(p.is_meta for p in loaded.parameters())
    assert torch.equal(answer(loaded, inputs), wanted)


def test_a_layer_that_returns_its_weight_returns_a_copy(tmp_path: Path) -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight[:2]

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Query() for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x) for layer in self.layers])

    model = Queries()
    path = saved(model, tmp_path / "model.safetensors")
    with init_empty_weights():
        loaded = Queries()
    load_checkpoint_and_dispatch(loaded, path, {"": "disk"}, dtype=torch.float64)
    assert torch.equal(answer(loaded, {"x": torch.zeros(1)}), answer(model.double(), {"x": torch.zeros(1)}))


def test_inference_mode(tmp_path: Path) -> None:
    loaded, inputs, wanted = streamed(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs), wanted)
        assert torch.equal(loaded(**inputs), wanted)


def test_writing_to_a_mapped_weight_leaves_the_file(tmp_path: Path) -> None:
    model, _, _ = made("mlp")
    path = saved(model, tmp_path / "model.safetensors")
    before = path.read_bytes()
    loaded = load_checkpoint_and_dispatch(empty("mlp"), path, {"": "disk"})
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert loaded[0].weight.sum() == 0


def test_two_models_share_an_offload_folder(tmp_path: Path) -> None:
    first, inputs, wanted = made("mlp", seed=1)
    second, _, also_wanted = made("mlp", seed=2)
    other, other_inputs, other_wanted = made("recurrent")
    for model in (first, second, other):
        disk_offload(model, tmp_path, "cpu")
    assert torch.equal(answer(first, inputs), wanted)
    assert torch.equal(answer(second, inputs), also_wanted)
    assert torch.equal(answer(other, other_inputs), other_wanted)
    assert len(list(tmp_path.iterdir())) == 2, "one file for each kind of model"


def test_files_of_another_model_in_the_offload_folder_are_not_read(tmp_path: Path) -> None:
    model, inputs, wanted = made("mlp")
    (tmp_path / "model.safetensors").write_bytes(b"of another model")
    disk_offload(model, tmp_path, "cpu")
    assert torch.equal(answer(model, inputs), wanted)
    assert (tmp_path / "model.safetensors").read_bytes() == b"of another model"


def test_offload_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    model, inputs, wanted = made("mlp")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"offload folder .*file"):
        disk_offload(model, tmp_path / "file", "cpu")
    assert torch.equal(answer(model, inputs), wanted), "the model is as it was"


def test_read_only_offload_folder_is_named(tmp_path: Path) -> None:
    model, inputs, wanted = made("mlp")
    folder = Path("/proc")  # read-only for root too
    with pytest.raises(CheckpointError, match="offload folder /proc cannot be used"):
        disk_offload(model, folder, "cpu")
    assert torch.equal(answer(model, inputs), wanted)


def test_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, wanted = made("mlp")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"KB are needed and 1\.0 KB are free"):
        disk_offload(model, tmp_path, "cpu")
    assert not list(tmp_path.iterdir())
    assert torch.equal(answer(model, inputs), wanted)


def test_disk_without_a_folder_to_write_to_is_refused() -> None:
    model, _, _ = made("mlp")
    with pytest.raises(ConfigError, match="give an offload_folder"):
        dispatch_model(model, {"": "disk"})


def test_deleted_checkpoint_stays_readable_while_it_is_mapped(tmp_path: Path) -> None:
    model, inputs, wanted = made("mlp")
    path = saved(model, tmp_path / "folder.safetensors")
    loaded = load_checkpoint_and_dispatch(empty("mlp"), path, {"": "disk"})
    path.unlink()
    assert torch.equal(answer(loaded, inputs), wanted)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    model, _, _ = made("mlp")
    state = model.state_dict()
    del state["2.bias"]
    state["extra.weight"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing there: 2\.bias; not in the model: extra\.weight"):
        load_checkpoint_and_dispatch(empty("mlp"), tmp_path, {"": "disk"})


def test_unexpected_tensors_warn_or_with_strict_fail(tmp_path: Path) -> None:
    model, inputs, wanted = made("mlp")
    save_file({**model.state_dict(), "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        loaded = load_checkpoint_and_dispatch(empty("mlp"), tmp_path, {"": "disk"})
    assert torch.equal(answer(loaded, inputs), wanted)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        load_checkpoint_and_dispatch(empty("mlp"), tmp_path, {"": "disk"}, strict=True)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    model, _, _ = made("mlp")
    save_file({**model.state_dict(), "0.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.bias is \(3,\) there and \(32,\) in the model"):
        load_checkpoint_and_dispatch(empty("mlp"), tmp_path, {"": "cpu"})


def test_buffers_come_from_the_checkpoint(tmp_path: Path) -> None:
    model, inputs, _ = made("convolutional")
    model[1].running_mean += 3
    wanted = answer(model, inputs)
    path = saved(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint_and_dispatch(empty("convolutional"), path, {"": "disk"})
    assert torch.equal(answer(loaded, inputs), wanted)
    loaded.train()
    answer(loaded, inputs)
    assert loaded[1].num_batches_tracked == 1, "a buffer is not streamed: what is written to it stays"


def test_plain_model_is_quiet(tmp_path: Path) -> None:
    model, inputs, _ = made("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch_model(model, {"": "cpu"})
        answer(model, inputs)
    assert dispatch_of(model).device.type == "cpu"
    shutil.rmtree(tmp_path)
