"""Seeds, files, environment variables, progress bars, sizes, models without their wrapper."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core import rng
from nbaccel.core.comm.collectives import barrier
from nbaccel.core.loop.wrappers import restore_forward
from nbaccel.core.world import join, read_environment
from nbaccel.errors import ConfigError

__all__ = [
    "convert_bytes",
    "extract_model_from_parallel",
    "is_compiled_module",
    "merge_dicts",
    "patch_environment",
    "save",
    "set_seed",
    "str_to_bool",
    "synchronize_rng_state",
    "synchronize_rng_states",
    "tqdm",
    "wait_for_everyone",
]


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seeds Python's, NumPy's and torch's generators; with `device_specific` each rank's differently."""
    rank = read_environment().rank
    rng.set_seed(seed, rank=rank, device_specific=device_specific, deterministic=deterministic)


def synchronize_rng_states(rng_types: Sequence[Any], generator: torch.Generator | None = None) -> None:
    """Gives every rank rank 0's states of the named generators ("generator": the one passed)."""
    names = [getattr(one, "value", one) for one in rng_types]
    rng.synchronize_rng_states(names, world=join(), generator=generator)


def synchronize_rng_state(rng_type: Any = None, generator: torch.Generator | None = None) -> None:
    """The same for one generator."""
    synchronize_rng_states([rng_type], generator)


def wait_for_everyone() -> None:
    """Waits until every rank is here."""
    barrier(join())


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Writes `obj` to `f` on the main process (of each machine): by torch.save, or a state dict as safetensors."""
    world = join()
    if not (world.is_local_main if save_on_each_node else world.is_main):
        return
    if not safe_serialization:
        torch.save(obj, f)
        return
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ConfigError(
            "safe_serialization=True needs safetensors: pip install nbaccel[safetensors]"
        ) from None
    save_file({name: tensor.contiguous() for name, tensor in obj.items()}, f, metadata={"format": "pt"})


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> nn.Module:
    """The user's own module inside DistributedDataParallel or DataParallel."""
    if recursive:
        raise ConfigError(
            "extract_model_from_parallel(recursive=True) does not exist here; unwrap each module"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not keep_fp32_wrapper:
        restore_forward(model)
    if not keep_torch_compile:
        model._compiled_call_impl = None
    return model


def is_compiled_module(module: nn.Module) -> bool:
    """Whether it is what `torch.compile(module)` gave, whose own module is `_orig_mod`; models are compiled in place
    here."""
    return "_orig_mod" in module._modules


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """`destination`, with what `source` has put into it, level by level."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def convert_bytes(size: float) -> str:
    """ "1.5 GB" for 1.5 * 1024 ** 3 bytes, and the like."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} PB"


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """A tqdm bar, on each machine's first rank only unless `main_process_only` is False."""
    from tqdm.auto import tqdm as bar

    if main_process_only and not kwargs.get("disable"):
        kwargs["disable"] = not join().is_local_main
    return bar(*args, **kwargs)


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """1 for y, yes, t, true, on, 1; 0 for n, no, f, false, off, 0; or as a bool.

    Raises:
        ValueError: neither.
    """
    if value.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True if to_bool else 1
    if value.lower() in ("n", "no", "f", "false", "off", "0"):
        return False if to_bool else 0
    raise ValueError(f"{value!r} is neither true nor false")


@contextmanager
def patch_environment(**variables: Any) -> Iterator[None]:
    """A context with these environment variables, named in capitals."""
    before = {name.upper(): os.environ.get(name.upper()) for name in variables}
    os.environ.update({name.upper(): str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
