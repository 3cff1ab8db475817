"""The arguments that other notebook launchers take, so that a call copied from a notebook works.

Names and defaults: accelerate 1.15 `notebook_launcher`, Lightning Fabric 2.6 `Fabric`,
`torch.multiprocessing.spawn` and torchrun. An argument that says what we do anyway is taken in
silence; one that has lost its meaning is named in a single warning; one that asks for what we cannot
do is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from nbaccel.checks import did_you_mean
from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError

__all__ = ["foreign_arguments"]

# Why an argument changes nothing here; the values beside it are the peers' defaults, or mean the same.
_NO_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_port": ((None, "29500", 29500, 0, "0"), "a free port is taken at every launch"),
    "master_port": ((None, "29500", 29500, 0, "0"), "a free port is taken at every launch"),
    "master_addr": ((None, "", "127.0.0.1", "localhost", "::1"), "the ranks of one host meet on 127.0.0.1"),
    "rdzv_backend": ((None, "", "static"), "the ranks meet at a store of the launch itself"),
    "rdzv_endpoint": ((None, ""), "the ranks meet at a store of the launch itself"),
    "rdzv_conf": ((None, {}), "the ranks meet at a store of the launch itself"),
    "rdzv_id": ((None, "", "none"), "every launch has its own id"),
    "monitor_interval": ((None, 0.1), "the end of a rank is noticed at once"),
    "log_line_prefix_template": ((None,), "lines of several ranks are labelled [rank 2]"),
}

_PRECISION = {
    "32": "no",
    "32-true": "no",
    "16": "fp16",
    "16-mixed": "fp16",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
}
_DEVICE = {"gpu": "cuda"}  # Fabric's word for it; the other names are ours too


def foreign_arguments(
    options: Mapping[str, Any], *, own: Iterable[str] = (), function: Callable[..., Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What other launchers' keyword arguments ask for, in our words.

    Args:
        options: the keyword arguments that are not our own.
        own: the names of the caller's own arguments, to answer a slip in one of them with the right name.
        function: what is launched, to know arguments that are meant for it.

    Returns:
        Options of ours that follow from them (a subset of num_processes, device, mixed_precision; to be
        combined with what was asked directly), and at most one warning, ready to be shown.

    Raises:
        ConfigError: one asks for what cannot be done, or its name is unknown.
    """
    accepted: dict[str, Any] = {}
    idle: list[str] = []
    for name, value in options.items():
        if name in _NO_EFFECT:
            _require_sane(name, value)
            silent, why = _NO_EFFECT[name]
            if value not in silent:
                idle.append(f"{name} ({why})")
        elif name in _READERS:
            for key, found in _READERS[name](name, value).items():
                if accepted.setdefault(key, found) != found:
                    raise ConfigError(
                        f"{name}={value!r} asks for {key}={found!r}, another for {accepted[key]!r}"
                    )
        else:
            raise ConfigError(_unknown(name, own, function))
    warnings = [f"nbaccel: no effect here, and safe to leave out: {'; '.join(idle)}."] if idle else []
    return accepted, warnings


def _unknown(name: str, own: Iterable[str], function: Callable[..., Any] | None) -> str:
    if name in _parameters(function):
        called = getattr(function, "__name__", "the function")
        return f"{name!r} is an argument of {called}, not of the launch: give it in kwargs={{{name!r}: …}}"
    options = (option.name for option in fields(RunConfig))
    known = {*own, *options, *_NO_EFFECT, *_READERS} - {name}  # some are another function's
    return (
        f"unknown argument {name!r}.{did_you_mean(name, known)} "
        "Arguments of your own function go into args=(…) and kwargs={…}."
    )


def _parameters(function: Callable[..., Any] | None) -> Iterable[str]:
    try:
        return () if function is None else inspect.signature(function).parameters
    except (TypeError, ValueError):  # it has none, or is no function
        return ()


def _require_sane(name: str, value: Any) -> None:
    if name in ("use_port", "master_port") and value is not None:
        text = str(value).strip()
        if isinstance(value, bool) or not text.isdigit() or int(text) > 65535:
            raise ConfigError(f"{name} must be a port number from 0 to 65535, not {value!r}")
    if name == "monitor_interval" and value is not None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not value > 0:
            raise ConfigError(f"monitor_interval must be a number of seconds above 0, not {value!r}")
    if name == "rdzv_conf" and value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"rdzv_conf must be a mapping, not {value!r}")


def _one_host(name: str, value: Any) -> dict[str, Any]:
    if value in (None, 1, "1", "1:1"):
        return {}
    raise ConfigError(
        f"{name}={value!r}: a notebook's launch over several hosts is not built yet. Leave {name} out to run "
        "here, or run a script with `nbaccel launch --nnodes` (or torchrun) on each host."
    )


def _first_host(name: str, value: Any) -> dict[str, Any]:
    if value in (None, 0, "0"):
        return {}
    raise ConfigError(
        f"{name}={value!r}: a notebook's launch over several hosts is not built yet, and on one host {name} is 0. "
        "Leave it out."
    )


def _count(name: str, value: Any) -> dict[str, Any]:
    # The peers also take "gpu", "auto" and -1 for all there are: that is what None means here.
    return {} if value in (None, "auto", "gpu", -1) else {"num_processes": value}


def _device(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, (str, type(None))):
        raise ConfigError(f"{name} is {value!r}: give a name, as in device='cuda'")
    return {} if value in (None, "auto") else {"device": _DEVICE.get(value, value)}


def _precision(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if str(value) not in _PRECISION:
        known = ", ".join(map(repr, _PRECISION))
        raise ConfigError(
            f"{name}={value!r} is not built; it can be one of {known}. Ours is mixed_precision='bf16'."
        )
    return {"mixed_precision": _PRECISION[str(value)]}


def _nothing(instead: str) -> Callable[[str, Any], dict[str, Any]]:
    def read(name: str, value: Any) -> dict[str, Any]:
        if value is None or value == [] or value == ():
            return {}
        raise ConfigError(f"{name} cannot be honoured here: {instead}")

    return read


def _joined(name: str, value: Any) -> dict[str, Any]:
    if value is True:
        return {}
    raise ConfigError(f"{name}={value!r}: use launch(…), which returns at once and leaves the notebook free")


_READERS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "num_nodes": _one_host,
    "nnodes": _one_host,
    "node_rank": _first_host,
    "nprocs": _count,
    "nproc_per_node": _count,
    "accelerator": _device,
    "precision": _precision,
    "plugins": _nothing("pass strategy= and mixed_precision= instead"),
    "callbacks": _nothing("call them in your function"),
    "loggers": _nothing("open your logger on rank 0 in your function"),
    "join": _joined,
    "daemon": lambda name, value: {},  # ranks never outlive the kernel, daemon or not
}
