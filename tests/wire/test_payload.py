"""What is packed arrives: values, sharing, the notebook's definitions; what cannot be is named."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import threading
import time
import types
import typing
from typing import Any

import numpy as np
import pytest
import torch

from nbaccel import notebook_launcher
from nbaccel.errors import PayloadError
from nbaccel.wire.payload import Parcel, Sidecar, install, pack, unpack
from nbaccel.wire.unpicklable import explain
from tests.wire.conftest import define


def round_trip(value: Any, *, outward: bool = True) -> Any:
    return opened(value, outward=outward)[0]


def opened(value: Any, *, outward: bool = True) -> tuple[Any, Sidecar, Parcel]:
    parcel, fd = pack(value, outward=outward)
    try:
        return (*unpack(parcel, fd), parcel)
    finally:
        if fd is not None:
            os.close(fd)


def test_small_value_travels_inline() -> None:
    parcel, fd = pack((len, ("x",), {}), outward=True)
    assert fd is None
    assert parcel.inline is not None
    assert unpack(parcel)[0] == (len, ("x",), {})


def test_large_tensor_is_not_in_the_pickle() -> None:
    tensor = torch.arange(1_000_000, dtype=torch.float32)
    back, _, parcel = opened(tensor)
    assert parcel.pickled < 10_000
    assert [size for _, size in parcel.buffers] == [4_000_000]
    assert torch.equal(back, tensor)


def test_buffers_are_aligned_for_kernels() -> None:
    tensors = [torch.rand(20_000 + n) for n in range(5)]
    back, _, parcel = opened(tensors)
    assert len(parcel.buffers) == 5
    assert all(offset % 64 == 0 for offset, _ in parcel.buffers)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back)


def test_views_and_ties_stay_shared() -> None:
    base = torch.zeros(50_000)
    layer = torch.nn.Linear(200, 200)
    first, view, tied, weight = round_trip((base, base[10:20], layer, layer.weight))
    first[10] = 7
    assert view[0] == 7
    assert tied.weight is weight


def test_received_tensor_is_writable_and_private() -> None:
    tensor = torch.zeros(100_000)
    parcel, fd = pack(tensor, outward=True)
    assert fd is not None
    one, other = unpack(parcel, fd)[0], unpack(parcel, fd)[0]
    one += 1
    assert other.sum() == 0
    assert tensor.sum() == 0
    os.close(fd)


def test_memory_file_is_sealed() -> None:
    _parcel, fd = pack(torch.zeros(100_000), outward=True)
    assert fd is not None
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.tensor(3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.randn(4, 5).t(),
        torch.randn(300, 300).to_sparse(),
        torch.ones(70_000, dtype=torch.bool),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3, requires_grad=True) * 2,
    ],
    ids=["empty", "scalar", "bf16", "transposed", "sparse", "bool", "parameter", "non-leaf"],
)
def test_tensor_of_any_kind_arrives(tensor: torch.Tensor) -> None:
    back = round_trip(tensor)
    assert type(back) is type(tensor)
    assert back.dtype == tensor.dtype
    assert back.requires_grad == tensor.requires_grad
    assert torch.equal(back.to_dense(), tensor.to_dense()) if tensor.is_sparse else torch.equal(back, tensor)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("outward", [True, False])
def test_dtype_without_a_typed_storage_travels(dtype: torch.dtype, outward: bool) -> None:
    base = torch.arange(100_000).remainder(200).to(dtype)
    marked = base[3:7].clone()
    marked.label = "mine"  # type: ignore[attr-defined]
    frozen = torch.nn.Parameter(base, requires_grad=False)
    (back, view, parameter, labelled), _, parcel = opened((base, base[5:], frozen, marked), outward=outward)
    assert torch.equal(back.view(torch.uint8), base.view(torch.uint8))
    assert (back.dtype, parameter.dtype, type(parameter)) == (dtype, dtype, torch.nn.Parameter)
    assert view.data_ptr() - back.data_ptr() == 5 * dtype.itemsize
    assert len(parcel.buffers) == 1
    assert labelled.label == "mine"


def computed_weights() -> list[torch.nn.Module]:
    ways = torch.nn.utils.parametrizations
    return [
        ways.weight_norm(torch.nn.Linear(4, 4)),
        ways.spectral_norm(torch.nn.Linear(4, 4)),
        ways.orthogonal(torch.nn.Linear(4, 4)),
        ways.weight_norm(torch.nn.LSTM(4, 4), "weight_hh_l0"),
    ]


@pytest.mark.parametrize("outward", [True, False])
def test_module_whose_weight_is_computed_travels(outward: bool) -> None:
    modules = torch.nn.ModuleList(computed_weights()).eval()
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    back, first = round_trip((modules, next(modules.parameters())), outward=outward)
    assert next(back.parameters()) is first
    for module, arrived in zip(modules, back, strict=True):
        assert isinstance(arrived, type(module).__bases__[0])
        assert arrived.state_dict().keys() == module.state_dict().keys()
        torch.testing.assert_close(arrived(x), module(x))
    torch.nn.utils.parametrize.remove_parametrizations(back[0], "weight")
    assert type(back[0]) is torch.nn.Linear
    assert type(modules[0]) is not torch.nn.Linear


def test_numpy_array_is_out_of_band_and_writable() -> None:
    array = np.arange(100_000)
    back, _, parcel = opened(array)
    assert len(parcel.buffers) == 1
    back[0] = 5
    assert array[0] == 0


def test_notebook_functions_share_one_namespace(main: types.ModuleType) -> None:
    define(
        main,
        "counter = 1\ndef bump():\n    global counter\n    counter += 1\ndef read():\n    return counter",
    )
    parcel, _ = pack((main.bump, main.read), outward=True)
    receiver = sys.modules["__main__"] = types.ModuleType("__main__")
    (bump, read), _ = unpack(parcel)
    bump()
    assert read() == 2
    assert receiver.__dict__["counter"] == 2
    assert main.counter == 1


def test_notebook_class_is_found_by_plain_pickle(main: types.ModuleType) -> None:
    define(main, "class Sample:\n    def __init__(self):\n        self.x = 1")
    parcel, _ = pack(main.Sample(), outward=True)
    receiver = sys.modules["__main__"] = types.ModuleType("__main__")
    value, sidecar = unpack(parcel)
    install(sidecar, receiver)
    assert pickle.loads(pickle.dumps(value)).x == 1


def test_instance_comes_back_as_the_notebooks_own_class(main: types.ModuleType) -> None:
    define(main, "class Sample:\n    pass")
    original = main.Sample
    parcel, _ = pack(original(), outward=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    there, _ = unpack(parcel)
    answer, _ = pack(there, outward=False)
    sys.modules["__main__"] = main
    back, _ = unpack(answer)
    assert type(back) is original


def test_returned_function_leaves_the_notebooks_variables_alone(main: types.ModuleType) -> None:
    define(main, "rate = 1\ndef f():\n    return rate")
    answer, _ = pack(main.f, outward=False)
    main.rate = 2
    f, _ = unpack(answer)
    assert main.rate == 2
    assert f() == 1


def test_wrapped_module_comes_back_plain() -> None:
    compiled = torch.compile(torch.nn.Linear(3, 3))
    back = round_trip({"model": compiled}, outward=False)["model"]
    assert type(back) is torch.nn.Linear
    assert torch.equal(back.weight, compiled.weight)


def test_wrapper_of_torchs_own_stays_behind() -> None:
    # Fabric's is in tests/peers/test_libraries_in_kernel
    back = round_trip([torch.nn.DataParallel(torch.nn.Linear(3, 3))], outward=False)
    assert [type(one) for one in back] == [torch.nn.Linear]


def refusals_of_divided() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    said = []
    for value in ({"model": model}, [next(model.parameters())]):
        try:
            pack(value, outward=False)
        except PayloadError as error:
            said.append(str(error))
    return said


@pytest.mark.usefixtures("clean")
def test_divided_module_is_refused_with_what_to_return() -> None:
    ((module, tensor),) = notebook_launcher(refusals_of_divided, num_processes=1, device="cpu")
    assert "the parameters of this FSDPLinear are divided among the ranks" in module
    assert "send accelerator.get_state_dict(model)" in module
    assert "this DTensor of shape (4, 4) is divided among the ranks" in tensor
    assert "send its full_tensor(), or accelerator.get_state_dict(model)" in tensor


def test_decorated_definitions_of_a_notebook_travel(main: types.ModuleType) -> None:
    define(
        main,
        "import functools, torch\n"
        "@functools.lru_cache(maxsize=7)\n"
        "def vocabulary():\n    return 3\n"
        "class Config:\n"
        "    @functools.cached_property\n"
        "    def width(self):\n        return 5\n"
        "@torch.compile(backend='eager', dynamic=True)\n"
        "def step(x):\n    return x + 1\n"
        "@functools.singledispatch\n"
        "def shown(x):\n    'Any.'\n    return 'any'\n"
        "@shown.register\n"
        "def _(x: list):\n    return [shown(one) for one in x]\n"
        "def train():\n"
        "    cached = vocabulary(), vocabulary.cache_parameters()['maxsize'], Config().width\n"
        "    return cached, shown([1, []]), shown.__doc__, step(torch.ones(2))\n",
    )
    values = round_trip(main.train, outward=True)()
    assert values[:3] == ((3, 7, 5), ["any", []], "Any.")
    assert values[3].tolist() == [2, 2]


def test_annotations_kept_as_text_mean_the_same_elsewhere(main: types.ModuleType) -> None:
    define(
        main,
        "from __future__ import annotations\n"
        "import dataclasses, torch\n"
        "from typing import Optional\n"
        "secret = object()\n"
        "@dataclasses.dataclass\n"
        "class Layer:\n    width: int\n"
        "@dataclasses.dataclass\n"
        "class Options:\n    layers: Optional[list['Layer']]\n    kind: torch.dtype\n    other: secret = 3\n"
        "def scale(x: Optional[Options], by: Layer) -> None: ...\n",
    )
    parcel, fd = pack((main.Options, main.scale), outward=True)
    assert fd is None
    wanted = typing.get_type_hints(main.scale)
    sys.modules["__main__"] = elsewhere = types.ModuleType("__main__")
    (options, scale), _ = unpack(parcel)
    assert "secret" not in elsewhere.__dict__  # a value: it stays
    elsewhere.__dict__["secret"] = int
    assert str(typing.get_type_hints(scale)) == str(wanted)
    hints = typing.get_type_hints(options)
    assert hints["layers"] == list[elsewhere.Layer] | None
    assert hints["kind"] is torch.dtype


def test_modules_that_opening_imports_are_told() -> None:
    import colorsys

    _, _, by_module = opened(lambda: colorsys.rgb_to_hls)
    _, _, by_function = opened(colorsys.rgb_to_hls)
    assert "colorsys" in by_module.modules
    assert "colorsys" in by_function.modules


lock = threading.Lock()


def uses_lock() -> None:
    with lock:
        pass


def closure_over(value: Any) -> Any:
    def inner() -> Any:
        return value

    return inner


class Holder:
    def __init__(self) -> None:
        self.connection = threading.Lock()


def by_value(function: Any) -> Any:
    """The function as a notebook's: pickled by value."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__module__ = "__main__"
    copy.__qualname__ = "not_to_be_found." + function.__name__
    return copy


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            (by_value(uses_lock), (), {}),
            ["variable 'lock'", "_thread.lock", "uses_lock(), line", "with lock:"],
        ),
        ((closure_over(lock), (), {}), ["variable 'value'", "_thread.lock", "inner()"]),
        ((len, ({"a": [1, (n for n in "x")]},), {}), ["args[0]['a'][1]", "generator", "list("]),
        ((len, (), {"deep": Holder()}), ["kwargs['deep'].connection", "_thread.lock"]),
        ((functools.partial(len, lock), (), {}), ["partial", "_thread.lock"]),
        ((Holder().__init__, (), {}), ["_thread.lock"]),
    ],
    ids=["global", "closure", "argument", "attribute", "partial", "method"],
)
def test_what_cannot_be_pickled_is_named(value: Any, words: list[str]) -> None:
    with pytest.raises(PayloadError) as caught:
        pack(value, outward=True)
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_come_back_is_named_as_returned() -> None:
    with pytest.raises(PayloadError) as caught:
        pack({"model": {"lock": lock}}, outward=False)
    said = str(caught.value)
    assert said.startswith("the returned value['model']['lock'] is a _thread.lock")
    assert "create it inside" not in said


def test_what_travels_is_not_named_for_what_does_not() -> None:
    with pytest.raises(PayloadError) as caught:
        pack({"model": computed_weights()[0], "deep": [1, lock]}, outward=False)
    assert str(caught.value).startswith("the returned value['deep'][1] is a _thread.lock")


def test_long_way_inside_a_librarys_object_is_left_out() -> None:
    deep = types.SimpleNamespace(
        transport=types.SimpleNamespace(connection=types.SimpleNamespace(guard_of_it=lock))
    )
    with pytest.raises(PayloadError) as caught:
        pack((len, (deep,), {}), outward=True)
    assert "is a types.SimpleNamespace with a _thread.lock inside it" in str(caught.value)
    assert "connection" not in str(caught.value)


def linked(length: int) -> Any:
    node = None
    for _ in range(length):
        node = types.SimpleNamespace(next=node)
    return node


@pytest.mark.parametrize(
    ("value", "outward", "start"),
    [
        ((len, (), {"nodes": linked(3000)}), True, "kwargs['nodes'] is a types.SimpleNamespace"),
        ((closure_over(linked(3000)), (), {}), True, "the variable 'value' is a types.SimpleNamespace"),
        ([linked(3000)], False, "the returned value is a list"),
    ],
    ids=["argument", "closure", "returned"],
)
def test_what_is_nested_too_deeply_is_said_to_be(value: Any, outward: bool, start: str) -> None:
    with pytest.raises(PayloadError) as caught:
        pack(value, outward=outward)
    assert str(caught.value).startswith(f"{start} that is nested too deeply")
    assert "flat list" in str(caught.value)


def test_search_for_what_cannot_be_pickled_ends_early_when_each_step_is_slow() -> None:
    asked = []

    def pickles(part: Any) -> bool:
        asked.append(part)
        time.sleep(0.3)
        return part is len

    nested: Any = lock
    for _ in range(50):
        nested = [nested]
    said = explain((len, (nested,), {}), TypeError("no"), pickles, outward=True)
    assert said.startswith("args[0]")
    assert len(asked) < 20


def test_failed_pack_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(PayloadError):
            pack([torch.zeros(100_000), lock], outward=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)
