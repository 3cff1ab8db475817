"""What a value computed from a batch says about the batch's real samples, and not about those that fill it up."""

from __future__ import annotations

from typing import Any

from nbaccel.core.nested import map_leaves

__all__ = ["real_part"]


def real_part(value: Any, real: int, size: int, *, lists: bool) -> tuple[Any, list[int]]:
    """`value` with the first `real` of `size` entries of all it holds per sample, and lengths that are others.

    Per sample are tensors and arrays with `size` rows; with `lists` lists and tuples of `size` entries as well,
    unless they hold such things themselves: a tuple that does, and a list of different ones, has a part for each.
    """
    cut: list[int] = []
    others: list[int] = []

    def take(leaf: Any) -> Any:
        rows = _rows(leaf)
        if rows == size or _is_list(leaf):
            cut.append(size)
            return leaf[:real]
        if rows is not None:
            others.append(rows)
        return leaf

    kept = map_leaves(take, value, is_leaf=lambda one: lists and _is_list(one) and _per_sample(one, size))
    if not cut and not others and _is_list(value):
        others.append(len(value))
    return kept, others


def _rows(value: Any) -> int | None:
    """Rows of a tensor or an array; None for anything else, and for one number."""
    shape = getattr(value, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _per_sample(entries: Any, size: int) -> bool:
    if len(entries) != size:
        return False
    parts = [one for one in entries if _rows(one) == size or (_is_list(one) and len(one) == size)]
    return not parts or not (isinstance(entries, tuple) or len({type(one) for one in entries}) > 1)
