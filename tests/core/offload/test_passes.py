"""Passes that are interrupted, forked, compiled; models that are copied in parts or cannot be dispatched."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nbaccel import (
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    load_checkpoint_and_dispatch,
    remove_hooks,
)
from nbaccel.core.offload.dispatched import dispatch_of, is_dispatched
from nbaccel.errors import ConfigError
from tests.core.offload.models import both, linears, saved

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Interrupted(nn.Linear):
    """By whoever sits at the keyboard."""

    stop = False

    def forward(self, x: Tensor) -> Tensor:
        if self.stop:
            raise KeyboardInterrupt
        return super().forward(x)


def _interrupted() -> nn.Sequential:
    return nn.Sequential(*(Interrupted(4, 4) for _ in range(6)))


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "one layer"])
def test_pass_that_was_interrupted_leaves_nothing_behind(whole: bool, tmp_path: Path) -> None:
    plain, loaded = both(_interrupted, tmp_path)
    streamer = dispatch_of(loaded).streamer
    assert streamer is not None
    with torch.no_grad():
        for layer in (*loaded, *loaded):
            layer.stop = True
            with pytest.raises(KeyboardInterrupt):
                (loaded if whole else layer)(X)
            layer.stop = False
        assert torch.equal(loaded(X), plain(X))
    assert all(p.is_meta for p in loaded.parameters())
    assert streamer._buffers._taken <= streamer._room, "no more than what is read ahead"
    assert not streamer._stack()


def test_hooks_are_removed_after_an_interrupted_layer(tmp_path: Path) -> None:
    plain, loaded = both(_interrupted, tmp_path)
    loaded[2].stop = True
    with pytest.raises(KeyboardInterrupt):
        loaded[2](X)
    loaded[2].stop = False
    remove_hooks(loaded)(X).sum().backward()
    assert torch.equal(loaded(X), plain(X))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_runs_the_model(tmp_path: Path) -> None:
    plain, loaded = both(linears, tmp_path)
    with torch.no_grad():
        wanted = plain(X)
        assert torch.equal(loaded(X), wanted)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(loaded(X), wanted) else 1)
    status = None
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


@pytest.mark.parametrize("part", [False, True], ids=["the model", "a layer"])
def test_compiled_model_answers_as_in_memory(part: bool, tmp_path: Path) -> None:
    plain, loaded = both(lambda: linears(5), tmp_path)
    run = loaded if part else torch.compile(loaded, backend="aot_eager")
    if part:
        loaded[1].compile(backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(run(X), plain(X))


class Listing(nn.Module):
    """Keeps its layers in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("again", COPIES, ids=["copied", "pickled"])
def test_copy_has_its_own_layers_in_its_lists(again: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, loaded = both(Listing, tmp_path)
    made = again(loaded)
    assert made.layers[0] is made.a
    assert not is_dispatched(made)
    with torch.no_grad():
        assert torch.equal(made(X), plain(X))
        assert torch.equal(loaded(X), plain(X))


@pytest.mark.parametrize("again", COPIES, ids=["copied", "pickled"])
@pytest.mark.parametrize("part", [lambda m: m[0], lambda m: m[:2], lambda m: nn.Sequential(m)])
def test_copy_of_a_part_is_plain(
    part: Callable[[Any], Any], again: Callable[[Any], Any], tmp_path: Path
) -> None:
    plain, loaded = both(lambda: linears(3), tmp_path)
    made = again(part(loaded))
    assert not is_dispatched(made)
    with torch.no_grad():
        assert torch.equal(made(X), part(plain)(X))
    assert made.state_dict().keys() == part(plain).state_dict().keys()
    made(X).sum().backward()


def test_graph_module_is_copied(tmp_path: Path) -> None:
    plain = torch.fx.symbolic_trace(linears())
    loaded = disk_offload(copy.deepcopy(plain), tmp_path, "cpu")
    for again in COPIES:
        assert torch.equal(again(loaded)(X.float()), plain(X.float()))


def test_class_whose_subclasses_want_an_argument_is_dispatched() -> None:
    class Named(nn.Module):
        def __init_subclass__(cls, /, name: str) -> None:
            cls.name = name

    class Mine(Named, name="mine"):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    model = dispatch_model(Mine(), {"": "cpu"})
    assert model.name == "mine"
    assert type(remove_hooks(model)) is Mine


def test_class_that_cannot_be_extended_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Final(type):
        def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
            if name == "Last" and len(bases) > 1:
                raise TypeError("nothing below it")
            return super().__new__(mcs, name, bases, namespace)

    class Last(nn.Linear, metaclass=Final):
        pass

    model = Last(4, 4)
    with pytest.raises(TypeError, match="nothing below it"):
        disk_offload(model, tmp_path, "cpu")
    assert not is_dispatched(model)
    assert not list(tmp_path.iterdir())
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="ScriptModule"):
        dispatch_model(torch.jit.script(linears()), {"": "cpu"})


def test_counting_operations_leaves_what_a_model_keeps_for_itself() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), None
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.arange(4.0)
            self.seen.append(x)
            return self.layer(x) * self.scale  # type: ignore[no-any-return]

    model = Caching()
    infer_auto_device_map(model, {"cpu": "1GB"}, batch=torch.ones(3, 4))
    assert model.scale is None
    assert model.seen == []
    assert type(model(torch.ones(3, 4))) is Tensor


def test_optimizer_stays_valid_where_nothing_moves() -> None:
    model = linears()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model[0].weight.note = "kept"
    remove_hooks(dispatch_model(model, {"": "cpu"}))
    before = model[1].weight.clone()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    assert model[0].weight.note == "kept"


def test_parameter_of_a_class_of_its_own_keeps_class_and_attributes(tmp_path: Path) -> None:
    class Scaled(nn.Parameter):
        pass

    def model() -> nn.Linear:
        made = nn.Linear(4, 4)
        made.weight = made.weight.data.as_subclass(Scaled)  # type: ignore[assignment]
        made.weight.scale = 3.0
        return made

    loaded = load_checkpoint_and_dispatch(
        model(), saved(nn.Linear(4, 4), tmp_path / "file.safetensors"), {"": "cpu"}
    )
    assert type(loaded.weight) is Scaled
    assert loaded.weight.scale == 3.0


def test_what_is_not_plain_is_not_streamed(tmp_path: Path) -> None:
    model = linears()
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse(), requires_grad=False)
    with pytest.raises(ConfigError, match=r"1\.weight cannot be on the disk"):
        disk_offload(model, tmp_path, "cpu")
    assert not list(tmp_path.iterdir())
    dispatch_model(model, {"": "cpu"})


def test_quantized_weights_stay_in_memory_and_are_counted(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.ones(2, 1000)
    wanted = model(x)
    with pytest.raises(ConfigError, match=r"0\.weight cannot be on the disk"):
        disk_offload(model, tmp_path, "cpu")
    dispatch_model(model, {"": "cpu"})
    assert torch.equal(model(x), wanted)
    assert "1.0 MB" in model.device_map_table(), "a byte for each number"


def test_dispatch_that_fails_halfway_leaves_a_model_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise MemoryError

    plain = linears()
    path = saved(plain, tmp_path / "file.safetensors")
    monkeypatch.setattr("nbaccel.core.offload.dispatch.free_memory", fail)
    model = linears()
    with pytest.raises(MemoryError):
        load_checkpoint_and_dispatch(model, path, {"": "disk"}, dtype=torch.float64)
    assert not is_dispatched(model)
    assert type(model) is nn.Sequential
    assert torch.equal(model(X), plain.double()(X))


def test_threads_and_files_of_a_failed_dispatch_are_gone(tmp_path: Path) -> None:
    threads = threading.active_count()
    save_file({"0.weight": torch.ones(4, 4)}, tmp_path / "file.safetensors")
    model = linears()
    with pytest.raises(Exception, match=r"missing there: 0\.bias"):
        load_checkpoint_and_dispatch(model, tmp_path / "file.safetensors", {"": "disk"})
    assert threading.active_count() == threads
    assert not is_dispatched(model)
