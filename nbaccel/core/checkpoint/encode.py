"""State dicts as JSON plus tensors, so that reading them back can run no code.

Plain values stand as themselves; what JSON cannot say is an object with the key "!" that names the kind.
Tensors and arrays are put aside under a name and travel in a tensor file.
"""

from __future__ import annotations

import base64
import collections
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, final

import torch

__all__ = ["Unencodable", "decode", "encode"]

_TAG = "!"
_FACTORIES: dict[str, type] = {"int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}


@final
class Unencodable(Exception):
    """A value of a kind this encoding does not know; `where` is its path, `kind` its type."""

    def __init__(self, where: str, kind: type) -> None:
        self.where, self.kind = where, f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(f"{where} is a {self.kind}")


def encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """`value` as JSON values; its tensors are added to `tensors` under names that begin with `where`.

    Types are matched exactly: a subclass may carry more than its base, and would come back as less.

    Raises:
        Unencodable: it holds something else than plain data.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
    if kind is list:
        return [encode(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
    if kind is dict:
        return _encode_dict(value, tensors, where)
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise Unencodable(where, kind)
        return {
            _TAG: "tensor",
            "v": _put_aside(value.detach(), tensors, where),
            "p": kind is torch.nn.Parameter,
        }
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(value, tensors, where)
    if isinstance(value, pathlib.PurePath):
        return {_TAG: "path", "v": str(value)}
    if "numpy" in sys.modules:
        return _encode_numpy(value, tensors, where)
    raise Unencodable(where, kind)


def _put_aside(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], where: str) -> str:
    name = where
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def _encode_dict(value: Mapping[Any, Any], tensors: dict[str, torch.Tensor], where: str) -> Any:
    if all(type(key) is str for key in value) and _TAG not in value:
        return {key: encode(v, tensors, f"{where}.{key}") for key, v in value.items()}
    return {_TAG: "dict", "v": _pairs(value, tensors, where)}


def _pairs(value: Mapping[Any, Any], tensors: dict[str, torch.Tensor], where: str) -> list[Any]:
    return [
        [encode(key, tensors, f"{where}.key{i}"), encode(v, tensors, f"{where}.{key}")]
        for i, (key, v) in enumerate(value.items())
    ]


def _sequence(tag: str) -> Callable[[Any, dict[str, torch.Tensor], str], Any]:
    def encode_sequence(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
        return {_TAG: tag, "v": [encode(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]}

    return encode_sequence


def _encode_defaultdict(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    factory = value.default_factory
    name = None if factory is None else next((n for n, f in _FACTORIES.items() if f is factory), "")
    if name == "":
        raise Unencodable(f"{where}.default_factory", type(factory))
    return {_TAG: "defaultdict", "f": name, "v": _pairs(value, tensors, where)}


_SPECIAL: dict[type, Callable[[Any, dict[str, torch.Tensor], str], Any]] = {
    tuple: _sequence("tuple"),
    torch.Size: _sequence("size"),
    set: _sequence("set"),
    frozenset: _sequence("frozenset"),
    collections.deque: lambda v, t, w: {**_sequence("deque")(v, t, w), "n": v.maxlen},
    collections.OrderedDict: lambda v, t, w: {_TAG: "ordered", "v": _pairs(v, t, w)},
    collections.Counter: lambda v, t, w: {_TAG: "counter", "v": _pairs(v, t, w)},
    collections.defaultdict: _encode_defaultdict,
    bytes: lambda v, t, w: {_TAG: "bytes", "v": base64.b64encode(v).decode()},
    bytearray: lambda v, t, w: {_TAG: "bytearray", "v": base64.b64encode(v).decode()},
    complex: lambda v, t, w: {_TAG: "complex", "v": [repr(v.real), repr(v.imag)]},
    torch.dtype: lambda v, t, w: {_TAG: "dtype", "v": str(v).removeprefix("torch.")},
    torch.device: lambda v, t, w: {_TAG: "device", "v": str(v)},
}


def _encode_numpy(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    import numpy

    if type(value) not in (numpy.ndarray,) and not isinstance(value, numpy.generic):
        raise Unencodable(where, type(value))
    if value.dtype.hasobject or value.dtype.names:
        raise Unencodable(where, type(value))
    raw = torch.tensor(numpy.frombuffer(value.tobytes(), dtype=numpy.uint8).copy())
    shape = list(value.shape) if isinstance(value, numpy.ndarray) else None
    return {_TAG: "numpy", "d": value.dtype.str, "s": shape, "v": _put_aside(raw, tensors, where)}


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `encode` was given. Tensors come back as they stand in `tensors`, without a copy."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(v, tensors) for key, v in value.items()}
    return _DECODERS[value[_TAG]](value, tensors)


def _decode_pairs(value: Any, tensors: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    return {decode(key, tensors): decode(v, tensors) for key, v in value["v"]}


def _decode_numpy(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    import numpy

    flat = tensors[value["v"]].numpy().view(numpy.dtype(value["d"])).copy()
    return flat[0] if value["s"] is None else flat.reshape(value["s"])


def _decode_tensor(value: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors[value["v"]]
    return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if value["p"] else tensor


_DECODERS: dict[str, Callable[[Any, Mapping[str, torch.Tensor]], Any]] = {
    "float": lambda v, t: float(v["v"]),
    "tensor": _decode_tensor,
    "numpy": _decode_numpy,
    "dict": _decode_pairs,
    "ordered": lambda v, t: collections.OrderedDict(_decode_pairs(v, t)),
    "counter": lambda v, t: collections.Counter(_decode_pairs(v, t)),
    "defaultdict": lambda v, t: collections.defaultdict(_FACTORIES.get(v["f"] or ""), _decode_pairs(v, t)),
    "tuple": lambda v, t: tuple(decode(v["v"], t)),
    "size": lambda v, t: torch.Size(v["v"]),
    "set": lambda v, t: set(decode(v["v"], t)),
    "frozenset": lambda v, t: frozenset(decode(v["v"], t)),
    "deque": lambda v, t: collections.deque(decode(v["v"], t), maxlen=v["n"]),
    "bytes": lambda v, t: base64.b64decode(v["v"]),
    "bytearray": lambda v, t: bytearray(base64.b64decode(v["v"])),
    "complex": lambda v, t: complex(float(v["v"][0]), float(v["v"][1])),
    "dtype": lambda v, t: getattr(torch, v["v"]),
    "device": lambda v, t: torch.device(v["v"]),
    "path": lambda v, t: pathlib.Path(v["v"]),
}
