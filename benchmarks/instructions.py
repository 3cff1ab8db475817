"""Counts the instructions of a piece of Python, whatever else the machine is doing.

A child runs under callgrind, which counts nothing until told: importing torch at full simulation would take
minutes. valgrind is told by a sequence of instructions that do nothing on a real processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["Counter", "can_count", "counts_of_child"]

# valgrind.h: the argument block in rax, the default answer in rdx, the answer in rdx.
_REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
_ZERO, _DUMP, _START, _STOP = 0x43540001, 0x43540003, 0x43540004, 0x43540005  # callgrind.h


def can_count() -> bool:
    """Whether this machine has callgrind and an instruction set it is asked in here."""
    return shutil.which("valgrind") is not None and platform.machine() in ("x86_64", "AMD64")


class Counter:
    """Counts what runs inside `counting(name)`; made in the child."""

    def __init__(self) -> None:
        self._code = mmap.mmap(-1, len(_REQUEST), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code.write(_REQUEST)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(address)

    def _ask(self, request: int, argument: int = 0) -> None:
        block = (ctypes.c_uint64 * 6)(request, argument)
        self._call(ctypes.addressof(block))

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Counts the block's instructions, garbage collection of what it makes included, under `name`."""
        gc.collect()
        gc.freeze()
        text = ctypes.create_string_buffer(name.encode())
        self._ask(_START)
        self._ask(_ZERO)
        yield
        self._ask(_DUMP, ctypes.addressof(text))
        self._ask(_STOP)

    def per_step(self, steps: Mapping[str, Callable[[], object]], repeat: int) -> None:
        """Counts `repeat` calls of each, after as many that are not counted."""
        for name, step in steps.items():
            for _ in range(repeat):
                step()
            with self.counting(name):
                for _ in range(repeat):
                    step()


def counts_of_child(script: str, arguments: Sequence[str], repeat: int) -> dict[str, float]:
    """Instructions per step by name, from `python script arguments`, which calls `Counter.per_step`.

    Raises:
        RuntimeError: the child failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        child = subprocess.run(
            [*command, sys.executable, script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if child.returncode:
            raise RuntimeError(child.stderr[-2000:])
        counts = {}
        parts = sorted(Path(folder).glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        for path in parts:
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
            if name is not None and total is not None:
                counts[name[1]] = int(total[1]) / repeat
    return counts
