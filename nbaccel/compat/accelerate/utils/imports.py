"""`is_<what>_available`: a device torch has, a precision, or an installed package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from nbaccel.compat.accelerate.names import look_up

_PACKAGES = {
    "4bit_bnb": "bitsandbytes",
    "8bit_bnb": "bitsandbytes",
    "bnb": "bitsandbytes",
    "hpu": "habana_frameworks",
    "torchdata_stateful_dataloader": "torchdata",
    "lomo": "lomo_optim",
    "mlu": "torch_mlu",
    "musa": "torch_musa",
    "npu": "torch_npu",
    "sdaa": "torch_sdaa",
}
"""Packages whose name is not the word in the function's."""


def is_cuda_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def is_mps_available() -> bool:
    """Whether torch sees an Apple GPU."""
    return torch.backends.mps.is_available()


def is_xpu_available() -> bool:
    """Whether torch sees an Intel GPU."""
    return torch.xpu.is_available()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether bf16 can be asked for; on the CPU it may be emulated."""
    return not is_cuda_available() or torch.cuda.is_bf16_supported()


def is_fp8_available() -> bool:
    """Whether a package that fp8 needs is installed."""
    return any(find_spec(package) is not None for package in ("torchao", "transformer_engine"))


def is_rocm_available() -> bool:
    """Whether torch was built for AMD's GPUs, and sees one."""
    return torch.version.hip is not None and is_cuda_available()


def is_fp16_available() -> bool:
    """Whether fp16 can be asked for."""
    return True


def __getattr__(name: str) -> Callable[..., bool]:
    if not (name.startswith("is_") and name.endswith("_available")):
        found: Callable[..., bool] = look_up(__name__, name)
        return found
    word = name.removeprefix("is_").removesuffix("_available")
    package = _PACKAGES.get(word, word)

    def is_available(*_: Any, **__: Any) -> bool:
        return find_spec(package) is not None

    is_available.__name__ = name
    is_available.__doc__ = f"Whether the package {package} is installed."
    return is_available
