"""A hook of ours is not on copies and pickles of a model, and not in the way of the user's there."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbaccel.core.model.hooks import Hook


class Watch:
    """Cannot be pickled, as what hooks of ours are bound to."""

    def __init__(self) -> None:
        self.calls = 0
        self.module = sys

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls += 1


def test_copies_and_pickles_do_without_it() -> None:
    watch, model = Watch(), nn.Linear(2, 2)
    model.register_forward_pre_hook(Hook(watch.called), with_kwargs=True)
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made(torch.ones(1, 2))
        made(input=torch.ones(1, 2))
    assert watch.calls == 2


def test_hooks_put_on_a_pickle_in_another_process_are_called_as_they_are(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for _ in range(3):
        model.register_forward_pre_hook(Hook(Watch().called), with_kwargs=True)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    source = """
import pickle, sys, torch
model = pickle.loads(open(sys.argv[1], "rb").read())
for _ in range(40):
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
assert len(model._forward_pre_hooks) == 43
print(model(torch.zeros(1, 2)).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path / "model")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr
