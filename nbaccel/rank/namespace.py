"""A rank's variables as the notebook asks for them: set, fetched, listed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["PREBOUND", "Variable", "bound", "is_definition", "pull", "push", "reload", "variables"]

PREBOUND = ("rank", "local_rank", "world_size", "device", "dist")
"""What every rank of a session finds in its namespace."""
_MAX_ITEMS = 100_000
_CHUNK = 1 << 24
_SCALARS = (bool, int, float, complex, str, bytes, type(None))

_DEFINITIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    types.GenericAlias,
    types.UnionType,
    functools.partial,
)

_T = TypeVar("_T")

_former: dict[tuple[str, str], list[weakref.ref[Any]]] = {}
"""By module and name, what stood there before it was read again, and others may hold still."""


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


def is_definition(value: object) -> bool:
    """Whether this is a function, a class, a module or an alias of a type rather than data.

    A function may have some arguments filled in, or be one of the notebook's that something else wraps and calls.
    """
    if isinstance(value, _DEFINITIONS) or type(value).__module__ == "typing":
        return True
    within = getattr(value, "__dict__", {}).get("__wrapped__") if callable(value) else None
    return isinstance(within, types.FunctionType) and within.__module__ == "__main__"


def push(values: Mapping[str, Any]) -> None:
    """Set these names."""
    sys.modules["__main__"].__dict__.update(values)


def bound(names: Iterable[str]) -> tuple[str, ...]:
    """Those of these names that have a value here."""
    return tuple(name for name in names if name in sys.modules["__main__"].__dict__)


def reload(modules: Sequence[str]) -> None:
    """Read these again where they are imported, as the notebook has. As with `%autoreload` there, the functions and
    classes that others took from them are brought up to date in place, and so are objects of these classes."""
    # slow to import, and most ranks need it never
    autoreload: Any = importlib.import_module("IPython.extensions.autoreload")

    for name in modules:
        module = sys.modules.get(name)
        if module is None:
            continue
        before = dict(vars(module))
        importlib.reload(module)
        for key, new in list(vars(module).items()):
            old = before.get(key)
            if old is new or not isinstance(old, (type, types.FunctionType)) or old.__module__ != name:
                continue
            former = _former.setdefault((name, key), [])
            former[:] = [*(one for one in former if one() is not None), weakref.ref(old)]
            for reference in former:
                # what cannot be changed in place stays, as it does in the notebook
                with contextlib.suppress(TypeError, ValueError):
                    autoreload.update_generic(reference(), new)


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
        if name.startswith("_") or name in hidden or name in PREBOUND or is_definition(value):
            continue
        found.append(_describe(name, value))
    return found


def _describe(name: str, value: Any) -> Variable:
    shape, dtype, device, size = _told(_extent, value) or (None, "", "", None)
    return Variable(
        name=name,
        type=type(value).__name__,
        shape=shape,
        dtype=dtype,
        device=device,
        bytes=size,
        checksum=_told(_checksum, value) or "",
        value=_told(_short, value) or "",
    )


def _told(tell: Callable[[Any], _T], value: Any) -> _T | None:
    """What `tell` says of a value, None when its own code raises: it is listed all the same."""
    try:
        return tell(value)
    except Exception:  # noqa: BLE001  # it may be anything
        return None


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, _SCALARS) else ""


def _checksum(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=4)
    return digest.hexdigest() if _feed(digest, value, [_MAX_ITEMS]) else ""


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
    if isinstance(value, _SCALARS):
        text = (
            hex(value) if isinstance(value, int) else repr(value)
        )  # Python refuses to write large ones in tens
        digest.update(f"{type(value).__name__}:{text};".encode("utf-8", "backslashreplace"))
        return True
    if (tensors := _tensors_of(value)) is not None:
        return all(_feed_array(digest, tensor) for tensor in tensors)
    if isinstance(value, (dict, set, frozenset)):
        return _feed_unordered(digest, value.items() if isinstance(value, dict) else value, left)
    if isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}[".encode())
        return all(_feed(digest, one, left) for one in value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _feed_array(digest, value)
    return False


def _feed_unordered(digest: Any, values: Iterable[Any], left: list[int]) -> bool:
    """The same for equal values, in whatever order they come."""
    parts = []
    for value in values:
        part = hashlib.blake2b(digest_size=8)
        if not _feed(part, value, left):
            return False
        parts.append(part.digest())
    digest.update(f"{len(parts)}{{".encode() + b"".join(sorted(parts)))
    return True


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
