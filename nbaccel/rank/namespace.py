"""A rank's variables as the notebook asks for them: set, fetched, listed."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Variable", "pull", "push", "variables"]

_PREBOUND = ("rank", "local_rank", "world_size", "device", "dist")
_MAX_ITEMS = 100_000
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One name of a rank."""

    name: str
    type: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    device: str = ""
    bytes: int | None = None
    """What its data takes; None where it cannot be told."""
    checksum: str = ""
    """Of its value, not of its place in memory; empty where it has none that can be compared."""
    value: str = ""
    """A short text, for numbers and strings."""


def push(values: Mapping[str, Any]) -> None:
    """Set these names."""
    sys.modules["__main__"].__dict__.update(values)


def pull(path: str) -> Any:
    """The value of a name, or of a dotted path from one.

    Raises:
        NameError: there is no such name here; AttributeError: or no such attribute.
    """
    name, *attributes = path.split(".")
    names = sys.modules["__main__"].__dict__
    if name not in names:
        raise NameError(f"name {name!r} is not defined in rank {names.get('rank', '?')}")
    return functools.reduce(getattr, attributes, names[name])


def variables() -> list[Variable]:
    """Every name the person gave a value, in alphabetical order; no modules, functions and classes."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    hidden = set(getattr(shell, "user_ns_hidden", ())) | {"In", "Out", "exit", "quit", "get_ipython"}
    found = []
    for name, value in sorted(sys.modules["__main__"].__dict__.items()):
        skipped = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
        if name.startswith("_") or name in hidden or name in _PREBOUND or isinstance(value, skipped):
            continue
        found.append(_describe(name, value))
    return found


def _describe(name: str, value: Any) -> Variable:
    digest = hashlib.blake2b(digest_size=4)
    try:
        comparable = _feed(digest, value, [_MAX_ITEMS])
    except Exception:  # noqa: BLE001  # a value's own code may raise anything; it is listed all the same
        comparable = False
    shape, dtype, device, size = _extent(value)
    text = repr(value)[:40] if isinstance(value, (bool, int, float, complex, str, bytes, type(None))) else ""
    return Variable(
        name=name,
        type=type(value).__name__,
        shape=shape,
        dtype=dtype,
        device=device,
        bytes=size,
        checksum=digest.hexdigest() if comparable else "",
        value=text,
    )


def _extent(value: Any) -> tuple[tuple[int, ...] | None, str, str, int | None]:
    """Shape, dtype, device and bytes."""
    if (tensors := _tensors_of(value)) is not None:
        first = next(iter(tensors), None)
        device = "" if first is None else str(first.device)
        dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
        return None, dtype, device, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    shape, kind = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and kind is not None:
        size = getattr(value, "nbytes", None)
        device = str(getattr(value, "device", "") or "")
        return tuple(map(int, shape)), str(kind).removeprefix("torch."), device, size
    if isinstance(value, (list, tuple, dict, set, frozenset, str, bytes, bytearray)):
        return (len(value),), "", "", sys.getsizeof(value)
    return None, "", "", None


def _tensors_of(value: Any) -> list[Any] | None:
    """Parameters and buffers of a module; None for anything else."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers()]
    return None


def _feed(digest: Any, value: Any, left: list[int]) -> bool:
    """Add a value to a checksum; whether it is one that can be compared."""
    left[0] -= 1
    if left[0] < 0:
        return False
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        digest.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "backslashreplace"))
        return True
    if (tensors := _tensors_of(value)) is not None:
        return all(_feed_array(digest, tensor) for tensor in tensors)
    if isinstance(value, dict):
        return all(_feed(digest, part, left) for item in value.items() for part in item)
    if isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode("utf-8", "backslashreplace"))
        return all(isinstance(one, (bool, int, float, str, bytes)) for one in value)
    if isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}[".encode())
        return all(_feed(digest, one, left) for one in value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _feed_array(digest, value)
    return False


def _feed_array(digest: Any, value: Any) -> bool:
    """A tensor's or array's shape, dtype and bytes."""
    torch = sys.modules.get("torch")
    digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
    if torch is not None and isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            return False  # sharded or sparse: there is no one value to compare
        flat = value.detach().reshape(-1).view(torch.uint8) if value.numel() else value.new_empty(0)
        for start in range(0, flat.numel(), _CHUNK):
            digest.update(flat[start : start + _CHUNK].cpu().numpy())
        return True
    data = getattr(value, "tobytes", None)
    if data is None or getattr(value.dtype, "hasobject", False):
        return False
    digest.update(data())
    return True
