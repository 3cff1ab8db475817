"""In which numbers a model computes: chosen once from what was asked and what the hardware has."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options

__all__ = ["Hardware", "Precision", "ScalerOptions", "choose_precision", "probe_hardware"]

Kind = Literal["no", "fp16", "bf16", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a device computes in by itself, not by emulation."""

    name: str
    device_type: str
    bf16: bool
    fp16: bool
    fp8: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerOptions:
    """The options of the gradient scaler that fp16 needs; torch's defaults."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The numbers in force. Parameters and gradients stay float32; strategies interpret the rest."""

    kind: Kind
    device_type: str
    why: str
    """One line: what was chosen and why."""
    scaler: ScalerOptions = ScalerOptions()
    fp8: FP8Options | None = None
    """How linear layers multiply in float8; None: not at all. What is not float8 is bf16."""
    emulates_fp8: bool = False
    """Whether the device has no float8 instructions."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for float32 as it is."""
        return {"no": None, "fp16": torch.float16}.get(self.kind, torch.bfloat16)

    def autocast(self, *, enabled: bool = True, cache_enabled: bool = True) -> AbstractContextManager[Any]:
        """A fresh context in which operations compute in this precision."""
        if self.dtype is None:
            return contextlib.nullcontext()
        # Ranks that are threads share the cache of casts, and one that leaves its context empties it for the others:
        # their graphs would differ. XLA finds equal casts itself.
        cached = cache_enabled and self.device_type != "xla"
        return torch.autocast(self.device_type, self.dtype, enabled=enabled, cache_enabled=cached)

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler fp16 needs, on the right device; None for the others."""
        if self.kind != "fp16":
            return None
        options = self.scaler
        return torch.amp.GradScaler(
            self.device_type,
            init_scale=options.init_scale,
            growth_factor=options.growth_factor,
            backoff_factor=options.backoff_factor,
            growth_interval=options.growth_interval,
        )


def probe_hardware(device: torch.device) -> Hardware:
    """What `device` really computes in."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp16, fp8 = (major, minor) >= (5, 3), (major, minor) >= (8, 9)
        return Hardware(name=name, device_type="cuda", bf16=bf16, fp16=fp16, fp8=fp8)
    if device.type == "cpu":
        flags = _cpu_flags()
        bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
        fp16 = bool(flags & {"avx512_fp16", "amx_fp16", "asimdhp"})
        return Hardware(name=f"this CPU ({platform.machine()})", device_type="cpu", bf16=bf16, fp16=fp16)
    if device.type == "mps":
        return Hardware(name="the Apple GPU", device_type="mps", bf16=False, fp16=True)
    return Hardware(name=f"the {device.type} device", device_type=device.type, bf16=True, fp16=True)


def _cpu_flags() -> set[str]:
    """The instruction sets in /proc/cpuinfo ("flags" on x86, "Features" on ARM), else what torch can tell."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return {"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else set()


def choose_precision(
    asked: str | None,
    hardware: Hardware,
    *,
    scaler: ScalerOptions | None = None,
    fp8: FP8Options | None = None,
    speak: bool = True,
) -> Precision:
    """The precision in force for what was asked ("no" when nothing was).

    Args:
        fp8: options of "fp8".
        speak: print what "auto" chose, warn where bf16 or fp8 is emulated: on rank 0 only.

    Raises:
        ConfigError: not supported; the message names what is.
    """
    kind, why = _choose(asked or "no", hardware)
    if speak and asked == "auto":
        print(f"mixed_precision='auto': {why}", flush=True)
    if speak and asked == "bf16" and not hardware.bf16:
        instead = "'fp16'" if hardware.fp16 and hardware.device_type != "cpu" else "'no' (float32)"
        _warn_emulated("bf16", hardware, instead)
    if speak and asked == "fp8" and not hardware.fp8:
        _warn_emulated("fp8", hardware, "'bf16'")
    return Precision(
        kind=kind,
        device_type=hardware.device_type,
        why=why,
        scaler=scaler or ScalerOptions(),
        fp8=(fp8 or FP8Options()) if kind == "fp8" else None,
        emulates_fp8=not hardware.fp8,
    )


def _warn_emulated(kind: str, hardware: Hardware, instead: str) -> None:
    warnings.warn(
        f"mixed_precision={kind!r} is emulated here: {hardware.name} has no {kind} instructions, so it is "
        f"slower than {instead}. It computes what {kind} hardware would.",
        stacklevel=4,
    )


def _choose(asked: str, hardware: Hardware) -> tuple[Kind, str]:
    supported: Mapping[str, bool] = {
        "no": True,
        "bf16": True,
        "fp16": hardware.device_type != "xla",
        "fp8": hardware.device_type in ("cpu", "cuda"),
    }
    if asked == "auto":
        if hardware.bf16:
            return "bf16", f"bf16, which {hardware.name} computes in hardware"
        if hardware.fp16:
            return "fp16", f"fp16, because {hardware.name} has fp16 but no bf16 instructions"
        return "no", f"float32, because {hardware.name} has neither bf16 nor fp16 instructions"
    if not supported.get(asked, False):
        known = ", ".join(repr(name) for name, good in supported.items() if good)
        raise ConfigError(
            f"mixed_precision={asked!r} is not supported on {hardware.name}; use {known} or 'auto'"
        )
    kinds: Mapping[str, Kind] = {"no": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
    return kinds[asked], f"{asked}, as asked"
