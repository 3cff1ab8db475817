"""The configurations of tests/core/test_configurations, asked in YAML: the command, the notebook and keyword
arguments ask the same of the ranks, and give the same losses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbaccel.config import RUN_CONFIG_VARIABLE
from nbaccel.session.configfile import dump
from tests.cli.conftest import Command, Writer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
from test_configurations import CONFIGURATIONS, train

ASKED = f"value = json.loads(os.environ[{RUN_CONFIG_VARIABLE!r}])\ndel value['sources']"


def asked() -> dict[str, Any]:
    """What a rank is asked, whoever asks it."""
    found: dict[str, Any] = json.loads(os.environ[RUN_CONFIG_VARIABLE])
    del found["sources"]
    return found


def three_ways(
    nbaccel: Command, script: Writer, name: str, function: Callable[[], Any], source: str
) -> list[list[Any]]:
    """What each rank's `function` returns: asked by the command, by a notebook with the file, by arguments.

    Args:
        source: statements that define `value`, the same, in a script.
    """
    from nbaccel import notebook_launcher

    num_processes, options = CONFIGURATIONS[name]
    arguments = {"num_processes": num_processes, "device": "cpu", "seed": 1, **options}
    Path("asked.yaml").write_text(dump(arguments))
    lines = [
        "import json, os, sys, warnings",
        "warnings.simplefilter('ignore')",
        *source.splitlines(),
        "open('value' + os.environ['RANK'], 'w').write(json.dumps(value))",
    ]
    done = nbaccel("launch", "--config", "asked.yaml", "--no-folder", script("\n".join(lines)))
    assert done.code == 0, done.err
    by_command = [json.loads(Path(f"value{rank}").read_text()) for rank in range(num_processes)]
    by_notebook = notebook_launcher(function, config="asked.yaml", output="none", folder=False)
    by_arguments = notebook_launcher(function, output="none", folder=False, **arguments)
    return [by_command, list(by_notebook), list(by_arguments)]


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_yaml_by_command_and_by_notebook_asks_what_the_arguments_do(
    clean, nbaccel: Command, script: Writer, name: str
):
    by_command, by_notebook, by_arguments = three_ways(nbaccel, script, name, asked, ASKED)
    assert by_command == by_notebook == by_arguments
    for key, value in CONFIGURATIONS[name][1].items():
        if not isinstance(value, dict):
            assert by_command[0][key] == value
        else:
            assert value.items() <= by_command[0][key].items()


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("one rank", "fsdp") else pytest.mark.long)
        for name in CONFIGURATIONS
    ],
)
def test_yaml_by_command_and_by_notebook_trains_as_the_arguments_do(
    clean, nbaccel: Command, script: Writer, name: str
):
    core = str(Path(__file__).resolve().parent.parent / "core")
    source = f"sys.path.insert(0, {core!r})\nfrom test_configurations import train\nvalue = train()"
    by_command, by_notebook, by_arguments = three_ways(nbaccel, script, name, train, source)
    assert by_command == by_notebook == by_arguments
    assert by_command[0][0] != by_command[0][-1]
