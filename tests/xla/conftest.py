"""Tests of the TPU code on torch_xla's CPU device; `make test-xla` runs them in an environment of their own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Kernel

# A step is over when its call is: replicas must not begin the next one with the last still waiting for the others.
os.environ["PJRT_CPU_ASYNC_CLIENT"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torch_xla") is not None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="torch_xla is not installed here: `make test-xla`"))


@pytest.fixture(scope="session")
def xla_kernel(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """A kernel in which torch_xla is imported and initialised."""
    started = Kernel(tmp_path_factory.mktemp("kernel"), env={"PJRT_DEVICE": "CPU"})
    shown = started.ok(
        "import torch, torch_xla\nprint((torch.ones(3, device=torch_xla.device()) * 2).cpu())", timeout=120
    )
    assert "2., 2., 2." in shown.stdout
    started.ok("from nbaccel import Accelerator, notebook_launcher, launch")
    yield started
    started.close()
