"""The names the package promises."""

from __future__ import annotations

import subprocess
import sys

import nbaccel


def test_every_public_name_can_be_imported() -> None:
    for name in nbaccel.__all__:
        assert getattr(nbaccel, name).__name__ == name


def test_launching_names_are_public() -> None:
    assert {"Run", "RunConfig", "last_run", "launch", "notebook_launcher"} <= set(nbaccel.__all__)


def test_nothing_heavy_is_imported_when_the_package_is() -> None:
    code = (
        "import sys, nbaccel; nbaccel.notebook_launcher; "
        "print([name for name in ('torch', 'numpy', 'IPython', 'ipywidgets') if name in sys.modules])"
    )
    light = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert light.stdout.strip() == "[]"


def test_accelerator_when_imported_leaves_what_shards_and_compiles_to_those_who_ask() -> None:
    late = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch._dynamo", "sympy")
    code = f"import sys; from nbaccel import Accelerator; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "[]"
