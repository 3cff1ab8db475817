"""What people log, in the one form each tracker is given: pictures, tables, plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nbaccel.errors import ConfigError

__all__ = ["NOT_FINITE", "beside_line", "flat", "leaves", "pictures", "plain", "rows", "simple"]

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""What `plain` makes of numbers that JSON cannot say."""

_CHANNELS = (1, 3, 4)
_OWN = ("step", "time")


def pictures(value: Any) -> list[Any]:
    """A picture, or several, as NumPy arrays (height, width, 1, 3 or 4) of uint8.

    Args:
        value: a tensor (…, channels, height, width), an array (…, height, width, channels) or channels first where
            only that can be meant, either without channels; floats are in [0, 1]. A PIL image, a matplotlib figure,
            or a list of any of these.

    Raises:
        ConfigError: it is none of them.
    """
    import numpy as np

    if isinstance(value, (list, tuple)):
        return [picture for one in value for picture in pictures(one)]
    if isinstance(value, torch.Tensor):
        array, first = (
            value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy(),
            True,
        )
    elif hasattr(value, "savefig") and hasattr(value, "canvas"):
        array, first = _drawn(value), False
    else:
        # a PIL image tells its own mode; others than these three have no plain channels
        if (mode := getattr(value, "mode", None)) is not None and mode not in ("L", "RGB", "RGBA"):
            value = value.convert("RGB")
        array, first = np.asarray(value), False
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise ConfigError(
            f"this is no picture: {type(value).__name__} of shape {getattr(array, 'shape', ())}"
        )
    if array.dtype.kind == "f":
        array = np.nan_to_num(array).clip(0, 1) * 255 + 0.5
    elif array.dtype.kind == "b":
        array = array * 255
    if array.size == 0:
        raise ConfigError(f"this is no picture: it has no pixel, shape {tuple(array.shape)}")
    array = array.clip(0, 255).astype(np.uint8)
    if array.ndim == 2:
        return [array[:, :, None]]
    if (first or array.shape[-1] not in _CHANNELS) and array.shape[-3] in _CHANNELS:
        array = np.moveaxis(array, -3, -1)
    if array.shape[-1] not in _CHANNELS:
        raise ConfigError(
            f"this is no picture: shape {tuple(array.shape)} has no dimension of 1, 3 or 4 channels, first or last"
        )
    return [np.ascontiguousarray(one) for one in array.reshape(-1, *array.shape[-3:])]


def _drawn(figure: Any) -> Any:
    """What a matplotlib figure shows."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def rows(columns: Sequence[str] | None, data: Any, dataframe: Any) -> tuple[list[str], list[list[Any]]]:
    """A table as column names and rows.

    Args:
        data: rows; or a mapping from column to its values.
        dataframe: instead of both, something with `columns` and `itertuples`, as pandas has.

    Raises:
        ConfigError: neither or both are given, or a row is not as long as there are columns.
    """
    if (dataframe is None) == (data is None):
        raise ConfigError("log_table takes columns= and data=, or dataframe=")
    if dataframe is not None:
        columns, data = list(dataframe.columns), dataframe.itertuples(index=False)
    elif isinstance(data, Mapping):
        columns, data = list(data), zip(*data.values(), strict=True)
    if columns is None:
        raise ConfigError("log_table needs columns= beside data=")
    names, found = [str(name) for name in columns], [[plain(cell) for cell in row] for row in data]
    for at, row in enumerate(found):
        if len(row) != len(names):
            raise ConfigError(f"log_table: row {at} has {len(row)} cells for {len(names)} columns")
    return names, found


def simple(value: Any) -> Any:
    """NumPy's scalars as Python's numbers and its arrays as tensors; anything else as it is."""
    if type(value).__module__ != "numpy" or getattr(getattr(value, "dtype", None), "kind", "") not in "biuf":
        return value
    return torch.tensor(value) if value.ndim else value.item()


def plain(value: Any) -> Any:
    """A value of types that JSON has; a number it cannot say is the string "NaN", "Infinity" or "-Infinity",
    which `float()` reads."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return NOT_FINITE[0 if math.isnan(value) else 1 if value > 0 else 2]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if callable(getattr(value, "item", None)) and getattr(value, "size", 1) == 1:
        return plain(value.item())  # NumPy's numbers
    return str(value)


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested mappings as one, "optimizer.lr"; what is no number, string or bool as JSON."""
    known = {name: plain(value) for name, value in leaves(values, within).items()}
    return {name: json.dumps(one) if isinstance(one, list) else one for name, one in known.items()}


def leaves(values: Mapping[str, Any], within: str = "", *, by: str = ".") -> dict[str, Any]:
    """Nested mappings as one, their values as they are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(leaves(value, f"{within}{key}{by}", by=by))
        else:
            found[f"{within}{key}"] = value
    return found


def beside_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a line that has a `step` and a `time` of its own: metrics called so become "metrics.step" and
    "metrics.time"."""
    return {f"metrics.{name}" if name in _OWN else name: value for name, value in values.items()}
