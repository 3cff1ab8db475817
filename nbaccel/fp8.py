"""How matrices are multiplied in float8: the options of `mixed_precision="fp8"`, as a user writes them.

    Accelerator(mixed_precision="fp8", fp8=FP8Options(recipe="rowwise"))

and in YAML `mixed_precision: fp8` with `fp8: {recipe: rowwise}` beside it. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nbaccel.checks import check_types
from nbaccel.errors import ConfigError

__all__ = ["FP8Options"]

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
Backend = Literal["torchao", "transformer_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Options:
    """Which linear layers multiply in float8, and what shares a scale.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    recipe: Recipe = "tensorwise"
    """What shares a scale: "tensorwise": a matrix, the fastest; "rowwise": a row, which bears outliers;
    "rowwise_with_gw_hp": the same, with the gradients of weights computed in bf16, the most accurate."""
    backend: Backend = "torchao"
    """Whose kernels: torchao's (extra "fp8"), or transformer-engine's ("transformer-engine"), on CUDA only."""
    skip: Sequence[str] | None = None
    """Names of linear layers that compute in bf16, in which `*` stands for one part of the name; None: the
    model's last one, whose outputs suffer most."""

    def __post_init__(self) -> None:
        check_types("fp8", self)
        if self.backend == "transformer_engine" and self.recipe != "tensorwise":
            raise ConfigError(
                f"fp8: recipe {self.recipe!r} is torchao's; backend 'transformer_engine' has 'tensorwise'"
            )
