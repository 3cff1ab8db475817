"""Where this process runs: front end, kernel, platform, resources, accelerators.

`probe()` looks, once, and is the one function of the session that reads the environment; everything
that decides is a pure function of the frozen value it returns, so a machine that is not here is a
value in a test. Front end and kernel are told apart: VS Code may show a kernel that runs on Colab.
The signs of the services were read in their documents and threads, not tried on all of them.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nbaccel.session.accelerators import Accelerators, read_accelerators
from nbaccel.session.resources import Resources, read_resources, text_of

__all__ = ["Environment", "FrontEnd", "Kernel", "Platform", "probe"]

Kernel = Literal["ipykernel", "ipython-terminal", "repl", "script"]
FrontEnd = Literal["jupyterlab", "notebook", "vscode", "colab", "kaggle", "databricks", "none"]
Platform = Literal["colab", "kaggle", "databricks", "sagemaker", "none"]

# What makes a process a rank of somebody's launch, all four together. SLURM_* alone means nothing.
_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Exact names, for the same prefixes hold credentials (KAGGLE_KEY).
_VARIABLES = frozenset(
    {
        *_RANK,
        "CLOUD_TPU_TASK_ID",
        "COLAB_RELEASE_TAG",
        "CPU_NUM_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "DATABRICKS_RUNTIME_VERSION",
        "HIP_VISIBLE_DEVICES",
        "JPY_PARENT_PID",
        "JPY_SESSION_NAME",
        "KAGGLE_KERNEL_RUN_TYPE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
        "PJRT_DEVICE",
        "PJRT_LOCAL_PROCESS_COUNT",
        "PJRT_LOCAL_PROCESS_RANK",
        "ROCR_VISIBLE_DEVICES",
        "TPU_CHIPS_PER_PROCESS_BOUNDS",
        "TPU_PROCESS_ADDRESSES",
        "TPU_PROCESS_BOUNDS",
        "TPU_PROCESS_PORT",
        "TPU_SKIP_MDS_QUERY",
        "TPU_VISIBLE_CHIPS",
        "TPU_VISIBLE_DEVICES",
        "TPU_WORKER_HOSTNAMES",
        "TPU_WORKER_ID",
        "XLA_AUTO_SPMD",
        "XLA_USE_SPMD",
        "ZE_AFFINITY_MASK",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Facts about this process and its host; the properties are what follows from them."""

    variables: Mapping[str, str] = field(default_factory=dict)
    """The environment variables that a decision depends on."""
    shell: Literal["ipykernel", "terminal", "none"] = "none"
    """The kind of IPython that runs the user's code."""
    prompt: bool = False
    """Python's own interactive prompt is up."""
    allow_stdin: bool = False
    """The cell that runs was sent by a front end that answers `input()`."""
    colab_loaded: bool = False
    """Colab's own module is in this process."""
    vscode_marked: bool = False
    """VS Code left the notebook's path in the user's namespace."""
    sagemaker_marked: bool = False
    """SageMaker's description of this machine is there."""
    server_command: str = ""
    """The command line of the Jupyter server that started the kernel."""
    is_tty: bool = False
    """Standard output is a terminal."""
    opened_by: str = ""
    """What in this process first opened an accelerator, as far as it was seen."""
    system: str = "linux"
    """As `sys.platform` says it."""
    machine: str = "x86_64"
    resources: Resources = field(default_factory=lambda: Resources(cores=1))
    accelerators: Accelerators = field(default_factory=Accelerators)

    @property
    def kernel(self) -> Kernel:
        """What runs the user's code."""
        if self.shell == "ipykernel":
            return "ipykernel"
        if self.shell == "terminal":
            return "ipython-terminal"
        return "repl" if self.prompt else "script"

    @property
    def live(self) -> bool:
        """Is somebody there to click? nbclient, nbconvert and papermill are not; nor is a Kaggle commit."""
        return self.kernel == "ipykernel" and self.allow_stdin

    @property
    def platform(self) -> Platform:
        """The service whose machine this is."""
        if self.colab_loaded or "COLAB_RELEASE_TAG" in self.variables:
            return "colab"
        if "KAGGLE_KERNEL_RUN_TYPE" in self.variables:
            return "kaggle"
        if "DATABRICKS_RUNTIME_VERSION" in self.variables:
            return "databricks"
        return "sagemaker" if self.sagemaker_marked else "none"

    @property
    def front_end(self) -> FrontEnd:
        """What draws the outputs; "none" also for one that nothing is known of."""
        if self.kernel != "ipykernel":
            return "none"
        if self.vscode_marked:
            return "vscode"
        if self.platform == "kaggle":
            return "none" if self.variables["KAGGLE_KERNEL_RUN_TYPE"] == "Batch" else "kaggle"
        if self.platform == "databricks":
            return "databricks"
        if not self.live:
            return "none"
        if self.platform == "colab":
            return "colab"
        if "JPY_SESSION_NAME" not in self.variables:  # jupyter console, Spyder: they take input too
            return "none"
        # whole words: a folder or a file of that name says nothing
        words = {os.path.basename(word) for word in self.server_command.split()}
        return "notebook" if words & {"jupyter-notebook", "notebook"} else "jupyterlab"

    @property
    def already_a_rank(self) -> bool:
        """Somebody else's launcher (torchrun, say) started this process as one of several."""
        return all(self.variables.get(name) for name in _RANK)


def probe() -> Environment:
    """Look at this process and its host. Call it from the main thread: a cell's request is told there.

    Opens no accelerator here and imports neither torch nor IPython.
    """
    shell = _ipython_shell()
    variables = {name: os.environ[name] for name in sorted(_VARIABLES & os.environ.keys())}
    machine = platform.machine()
    return Environment(
        variables=variables,
        shell=_shell_kind(shell),
        prompt=hasattr(sys, "ps1"),
        allow_stdin=_allows_stdin(shell),
        colab_loaded="google.colab" in sys.modules,
        vscode_marked="__vsc_ipynb_file__" in getattr(shell, "user_ns", {}),
        sagemaker_marked=Path("/opt/ml/metadata/resource-metadata.json").exists(),
        server_command=_command_of(variables.get("JPY_PARENT_PID", "")),
        is_tty=_is_tty(),
        system=sys.platform,
        machine=machine,
        resources=read_resources(),
        accelerators=read_accelerators(system=sys.platform, machine=machine),
    )


def _is_tty() -> bool:
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # it is closed
        return False


def _ipython_shell() -> Any:
    """The IPython shell that runs in this process, or None."""
    module = sys.modules.get("IPython")
    # A half-imported IPython (we are asked during its start) has no get_ipython yet.
    get = getattr(module, "get_ipython", None)
    return get() if get is not None else None


def _shell_kind(shell: Any) -> Literal["ipykernel", "terminal", "none"]:
    if shell is None:
        return "none"
    return "ipykernel" if "IPKernelApp" in shell.config else "terminal"


def _allows_stdin(shell: Any) -> bool:
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    try:
        parent = kernel.get_parent("shell")
    except LookupError:  # ipykernel 7.0 in a thread that no cell started
        return False
    return bool((parent or {}).get("content", {}).get("allow_stdin"))


def _command_of(pid: str) -> str:
    return text_of(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() if pid.isdigit() else ""
