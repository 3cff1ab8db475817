"""Whether a library is as new as a script needs it."""

from __future__ import annotations

import operator
from importlib.metadata import version
from typing import Any

import torch
from torch.torch_version import TorchVersion

__all__ = ["compare_versions", "is_torch_version"]

_OPERATIONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Whether a library, by name, or a parsed version is `operation` (such as ">=") `requirement_version`.

    Raises:
        ValueError: there is no such operation.
    """
    if operation not in _OPERATIONS:
        raise ValueError(f"operation is {operation!r}; there are {', '.join(_OPERATIONS)}")
    named = isinstance(library_or_version, str) and not isinstance(library_or_version, TorchVersion)
    found = TorchVersion(version(library_or_version) if named else str(library_or_version))
    return bool(_OPERATIONS[operation](found, requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """The same for torch."""
    return compare_versions(torch.__version__, operation, version)
