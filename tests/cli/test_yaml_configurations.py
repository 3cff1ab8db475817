"""The configurations of tests/core/test_configurations, asked in YAML: the command, the notebook and keyword
arguments give the same losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nbaccel.session.configfile import dump
from tests.cli.conftest import Command, Writer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
from test_configurations import CONFIGURATIONS, train


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_yaml_by_command_and_by_notebook_trains_as_the_arguments_do(
    clean, nbaccel: Command, script: Writer, name: str
):
    from nbaccel import notebook_launcher

    num_processes, options = CONFIGURATIONS[name]
    asked = {"num_processes": num_processes, "device": "cpu", "seed": 1, **options}
    Path("asked.yaml").write_text(dump(asked))
    trained = script(f"""
        import json, os, sys, warnings
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(Path(__file__).resolve().parent.parent / "core")!r})
        from test_configurations import train
        open("losses" + os.environ["RANK"], "w").write(json.dumps(train()))
    """)
    done = nbaccel("launch", "--config", "asked.yaml", "--no-folder", trained)
    assert done.code == 0, done.err
    by_command = [json.loads(Path(f"losses{rank}").read_text()) for rank in range(num_processes)]
    by_notebook = notebook_launcher(train, config="asked.yaml", output="none", folder=False)
    by_arguments = notebook_launcher(train, output="none", folder=False, **asked)
    assert by_command == list(by_notebook) == list(by_arguments)
    assert by_command[0][0] != by_command[0][-1]
