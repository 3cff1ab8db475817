from __future__ import annotations

import math

import numpy as np
import torch

from nbaccel.session.results import Results


def test_equal_values_are_shown_once() -> None:
    large = torch.full((100,), math.nan)
    assert repr(Results([large, large.clone()])) == "[0-1] Tensor(shape=(100,), dtype=torch.float32)"
    assert repr(Results([[0] * 20, [0] * 20])) == "[0-1] [0, 0, 0, 0, 0, 0, ...]"
    assert repr(Results([torch.nn.ReLU(), torch.nn.ReLU()])) == "[0-1] ReLU()"


def test_values_that_differ_where_their_short_text_does_not_are_shown_apart() -> None:
    for one, other in [
        (torch.zeros(100), torch.ones(100)),
        (np.zeros(100), np.ones(100)),
        ([*range(6), 1], [*range(6), 2]),
        ({n: n for n in range(9)}, {n: n % 8 for n in range(9)}),
        ("a" * 500 + "b" + "a" * 500, "a" * 500 + "c" + "a" * 500),
    ]:
        lines = repr(Results([one, other, one])).splitlines()
        assert [line[: line.index("]") + 1] for line in lines] == ["[0,2]", "[1]"]
