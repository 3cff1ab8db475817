"""Front end, kernel and platform: from recorded services, and probed in real processes and kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nbaccel
from nbaccel.session.environment import Environment

REPOSITORY = Path(nbaccel.__file__).parents[1]
LAB = {"JPY_SESSION_NAME": "/home/user/a.ipynb", "JPY_PARENT_PID": "7"}


@dataclass(frozen=True)
class Case:
    facts: dict[str, Any]
    kernel: str
    front_end: str
    platform: str
    live: bool


def jupyter(variables: dict[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    return {"shell": "ipykernel", "allow_stdin": True, "variables": variables or {}, **facts}


CASES = {
    "jupyterlab": Case(
        jupyter(LAB, server_command="python /bin/jupyter-lab"), "ipykernel", "jupyterlab", "none", True
    ),
    "notebook": Case(
        jupyter(LAB, server_command="python /bin/jupyter-notebook"), "ipykernel", "notebook", "none", True
    ),
    "hub": Case(
        jupyter(LAB, server_command="jupyterhub-singleuser"), "ipykernel", "jupyterlab", "none", True
    ),
    "papermill": Case(jupyter(allow_stdin=False), "ipykernel", "none", "none", False),
    "papermill from a notebook": Case(jupyter(LAB, allow_stdin=False), "ipykernel", "none", "none", False),
    "console": Case(jupyter(), "ipykernel", "none", "none", True),
    "vscode": Case(jupyter(vscode_marked=True), "ipykernel", "vscode", "none", True),
    "vscode on colab": Case(
        jupyter(vscode_marked=True, colab_loaded=True), "ipykernel", "vscode", "colab", True
    ),
    "colab": Case(
        jupyter({"COLAB_RELEASE_TAG": "release-colab_1"}, colab_loaded=True),
        "ipykernel",
        "colab",
        "colab",
        True,
    ),
    "colab papermill": Case(
        jupyter({"COLAB_RELEASE_TAG": "release-colab_1"}, allow_stdin=False),
        "ipykernel",
        "none",
        "colab",
        False,
    ),
    "kaggle": Case(jupyter({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}), "ipykernel", "kaggle", "kaggle", True),
    "kaggle batch": Case(
        jupyter({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, allow_stdin=False), "ipykernel", "none", "kaggle", False
    ),
    "databricks": Case(
        jupyter({"DATABRICKS_RUNTIME_VERSION": "15.4"}, allow_stdin=False),
        "ipykernel",
        "databricks",
        "databricks",
        False,
    ),
    "sagemaker": Case(jupyter(LAB, sagemaker_marked=True), "ipykernel", "jupyterlab", "sagemaker", True),
    "ipython": Case({"shell": "terminal", "is_tty": True}, "ipython-terminal", "none", "none", False),
    "repl": Case({"prompt": True, "is_tty": True}, "repl", "none", "none", False),
    "script": Case({}, "script", "none", "none", False),
    "script started by a notebook": Case({"variables": LAB}, "script", "none", "none", False),
    "script on kaggle": Case(
        {"variables": {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}}, "script", "none", "kaggle", False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_environment_when_recorded_on(name: str) -> None:
    case = CASES[name]
    found = Environment(**case.facts)
    assert (found.kernel, found.front_end, found.platform, found.live) == (
        case.kernel,
        case.front_end,
        case.platform,
        case.live,
    )
    assert found.already_a_rank is False


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize("missing", [None, *TORCHRUN])
def test_already_a_rank_only_when_all_four_variables_are_set(missing: str | None) -> None:
    variables = {name: value for name, value in TORCHRUN.items() if name != missing}
    assert Environment(variables=variables).already_a_rank is (missing is None)
    assert Environment(variables={**variables, "RANK": ""}).already_a_rank is False


PROBE = """
import json, sys
from nbaccel.session.environment import probe
e = probe()
heavy = sorted({"torch", "IPython", "numpy"} & set(sys.modules))
print("probed " + json.dumps([e.kernel, e.front_end, e.platform, e.live, e.is_tty, dict(e.variables), heavy]))
"""


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what the probe looks at."""
    dropped = ("JPY_", "KAGGLE_", "COLAB_", "OMP_NUM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **variables}


def probed(text: str) -> list[Any]:
    line = next(line for line in text.splitlines() if "probed " in line)
    found: list[Any] = json.loads(line.partition("probed ")[2])
    return found


def run(command: list[str], text: str = "", **variables: str) -> list[Any]:
    ended = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(**variables),
        check=False,
    )
    assert "probed " in ended.stdout, ended.stderr
    return probed(ended.stdout)


def test_probe_in_a_script_imports_nothing_heavy_and_keeps_no_credentials() -> None:
    found = run([sys.executable, "-c", PROBE], KAGGLE_KEY="secret", OMP_NUM_THREADS="3", **TORCHRUN)
    assert found == ["script", "none", "none", False, False, {**TORCHRUN, "OMP_NUM_THREADS": "3"}, []]


def test_probe_in_a_python_prompt() -> None:
    found = run([sys.executable, "-i", "-q"], text=f"exec({PROBE!r})\n")
    assert found[:2] == ["repl", "none"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_probe_in_terminal_ipython_on_a_terminal(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    options = ["--no-banner", "--no-confirm-exit", "--quick", "-c", PROBE]
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", *options],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=clean_environment(IPYTHONDIR=str(tmp_path)),
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # how a pseudo terminal says that its other end is closed
        pass
    finally:
        os.close(master)
        assert process.wait(timeout=60) == 0
    found = probed(shown.decode())
    assert found[:2] == ["ipython-terminal", "none"]
    assert found[4] is True
    assert "torch" not in found[6]


@pytest.mark.kernel
@pytest.mark.parametrize("allow_stdin", [True, False], ids=["front end", "papermill"])
def test_probe_in_a_real_kernel(tmp_path: Path, allow_stdin: bool) -> None:
    from jupyter_client.manager import start_new_kernel

    environment = clean_environment(JPY_SESSION_NAME="a.ipynb", IPYTHONDIR=str(tmp_path))
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    shown: list[str] = []
    try:
        client.execute_interactive(
            PROBE,
            allow_stdin=allow_stdin,
            timeout=60,
            output_hook=lambda message: shown.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kernel, front_end, platform, live, is_tty, variables, heavy = probed("".join(shown))
    assert (kernel, live, is_tty, platform) == ("ipykernel", allow_stdin, False, "none")
    assert front_end == ("jupyterlab" if allow_stdin else "none")
    assert variables["JPY_SESSION_NAME"] == "a.ipynb"
    assert "torch" not in heavy
