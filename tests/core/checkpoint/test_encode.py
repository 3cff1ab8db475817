from __future__ import annotations

import collections
import json
import math
import pathlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbaccel.core.checkpoint.encode import Unencodable, decode, encode


def through(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    return decode(json.loads(json.dumps(encode(value, tensors, "x"), allow_nan=False)), tensors)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.sets(st.integers())
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    back = through(value)
    assert back == value
    assert type(back) is type(value)


def test_dict_with_the_tag_as_key_comes_back() -> None:
    assert through({"!": "tuple", "v": [1]}) == {"!": "tuple", "v": [1]}


def test_not_a_number_comes_back() -> None:
    assert math.isnan(through(float("nan")))
    assert through([math.inf, -math.inf]) == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(b=1, a=2),
        collections.Counter("abca"),
        collections.defaultdict(list, {1: [2]}),
        collections.deque([1, 2, 3], maxlen=3),
        frozenset({1}),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda", 1),
        pathlib.Path("a/b"),
        bytearray(b"ab"),
        random.Random(3).getstate(),
        np.float32(2.5),
        np.int64(-3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_special_kinds_come_back(value: Any) -> None:
    back = through(value)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, collections.OrderedDict):
        assert list(back) == list(value)
    if isinstance(value, collections.deque):
        assert back.maxlen == value.maxlen


def test_tensors_and_arrays_come_back_by_name() -> None:
    value = {
        "a": torch.arange(3),
        "b": [torch.ones(2, dtype=torch.bfloat16)],
        "n": np.arange(6, dtype=">u2").reshape(2, 3),
    }
    back = through(value)
    assert torch.equal(back["a"], value["a"])
    assert torch.equal(back["b"][0], value["b"][0])
    assert back["n"].dtype == value["n"].dtype
    assert (back["n"] == value["n"]).all()


def test_numpy_generator_state_comes_back() -> None:
    state = np.random.RandomState(5).get_state()
    other = np.random.RandomState(6)
    other.set_state(through(state))
    assert other.random_sample() == np.random.RandomState(5).random_sample()


class Subclass(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("value", [object(), Subclass(), lambda: 0, np.array([object()])], ids=type)
def test_other_kinds_are_refused_with_their_place(value: Any) -> None:
    with pytest.raises(Unencodable) as caught:
        encode({"a": [value]}, {}, "item")
    assert caught.value.where == "item.a.0"
