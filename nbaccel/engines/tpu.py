"""What TorchTPU's ranks must be told together before any of them opens its chip.

Its own `set_tpu_launch_env` chooses ports and the topology for all of a host's processes and puts them in the
environment of the one that is about to start them. It is asked in an interpreter of its own: the process that forks
ranks has to stay single-threaded and away from the chips. Source: torch-tpu 0.2, `torch.tpu.distributed`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

from nbaccel.errors import LaunchError
from nbaccel.rank.spec import RunSpec

__all__ = ["with_launch_environment"]

_PATIENCE = 300.0  # seconds: a first import of torch from a cold disk
_MARK = "nbaccel-tpu-environment "
_ASK = """
import json, os, sys
asked = json.loads(sys.argv[1])
sys.path[:] = asked["path"]
before = dict(os.environ)
import torch, torch_tpu
from torch.tpu import distributed
distributed.set_tpu_launch_env(nproc_per_node=asked["count"])
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
print(asked["mark"] + json.dumps(changed))
"""


def with_launch_environment(spec: RunSpec) -> RunSpec:
    """`spec`, with what TorchTPU's ranks need in their environment; as it is for other runtimes.

    Raises:
        LaunchError: TorchTPU cannot make ranks of these chips; its own words are in the message.
    """
    if spec.runtime != "torch_tpu":
        return spec
    found = _ask({**spec.environ, **spec.variables}, spec.sys_path, spec.num_processes)
    return replace(spec, variables={**spec.variables, **found})


def _ask(environ: Mapping[str, str], path: tuple[str, ...], count: int) -> dict[str, str]:
    both = [*path, *(entry for entry in sys.path if entry not in path)]
    command = [sys.executable, "-c", _ASK, json.dumps({"path": both, "count": count, "mark": _MARK})]
    try:
        ended = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"TorchTPU did not say within {_PATIENCE:.0f} s how its ranks are told apart"
        ) from None
    for line in ended.stdout.splitlines():
        if line.startswith(_MARK):
            found: dict[str, str] = json.loads(line.removeprefix(_MARK))
            return found
    said = ended.stderr.strip().splitlines()[-1:] or [f"it ended with exit code {ended.returncode}"]
    raise LaunchError(
        f"TorchTPU cannot make {count} rank{'s' * (count != 1)} of this host's chips: {said[0]}. To use torch_xla, ask "
        "for tpu_runtime='torch_xla'."
    )
