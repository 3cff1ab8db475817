"""A function finds the submodules it refers to where it arrives, as with cloudpickle's own search."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pickle
import subprocess
import sys
import xml.etree.ElementTree
from typing import Any

import torch
from cloudpickle import cloudpickle

from nbaccel.wire import payload
from nbaccel.wire.submodules import _imported_submodules

SHOW = """
import os, pickle, sys
from nbaccel.wire import payload
(function, _), _ = payload.unpack(pickle.loads(bytes.fromhex(sys.argv[1])))
print(function(), "concurrent.futures" in sys.modules)
"""


def use_deep() -> Any:
    return torch.nn.functional.relu(torch.ones(1)), torch.distributed.algorithms.ddp_comm_hooks


def use_two() -> Any:
    return concurrent.futures.ThreadPoolExecutor, xml.etree.ElementTree.parse, json.decoder


def use_none() -> Any:
    return os.sep, torch, json


def test_submodules_are_those_that_cloudpickle_finds() -> None:
    packages = [torch, concurrent, xml, json, os, 3, None]
    for function in (use_deep, use_two, use_none):
        mine = _imported_submodules(function.__code__, packages)
        theirs = cloudpickle._find_imported_submodules(function.__code__, packages)
        assert {id(module) for module in mine} == {id(module) for module in theirs}
    assert torch.nn.functional in _imported_submodules(use_deep.__code__, packages)
    assert not _imported_submodules(use_none.__code__, packages)


def test_function_when_its_submodule_was_never_imported_there_runs() -> None:
    def pool() -> str:
        return concurrent.futures.ThreadPoolExecutor.__name__

    pool.__module__ = "__main__"
    parcel, fd = payload.pack((pool, None), outward=False)
    assert fd is None
    sent = pickle.dumps(parcel).hex()
    said = subprocess.run(
        [sys.executable, "-c", SHOW, sent], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["ThreadPoolExecutor", "True"]
