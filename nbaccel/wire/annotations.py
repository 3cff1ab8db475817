"""What annotations that are kept as text name: `typing.get_type_hints` looks for it where they were written."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["named_by"]


def named_by(obj: type | types.FunctionType, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Types and modules of `namespace` that annotations of a class or function name as text, by name.

    Nothing else is taken: an annotation is no reason to send a value along.
    """
    try:
        annotations = inspect.get_annotations(obj)
    except Exception:  # noqa: BLE001  # evaluated only now (Python 3.14), they may raise anything
        return {}
    names = {name for text in annotations.values() if isinstance(text, str) for name in _names(text)}
    return {name: namespace[name] for name in names if name in namespace and _is_type(namespace[name])}


def _names(text: str) -> Iterator[str]:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _names(node.value)


def _is_type(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType, types.GenericAlias, types.UnionType)):
        return True
    return typing.get_origin(value) is not None or type(value).__module__ == "typing"
