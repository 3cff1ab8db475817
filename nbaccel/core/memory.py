"""Finding a batch size that fits: when one rank runs out of memory, all of them halve it together."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nbaccel import gloo
from nbaccel.core.comm.frames import exchange_objects
from nbaccel.core.world import World, join, read_environment
from nbaccel.errors import ConfigError

__all__ = ["find_executable_batch_size", "is_out_of_memory", "meet_in_search"]

R = TypeVar("R")
_KEY = "nbaccel/out-of-memory"
_size: ContextVar[int | None] = ContextVar("_size", default=None)
"""The batch size being tried."""


def find_executable_batch_size(
    function: Callable[..., R] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Decorator: calls `function(batch_size, ...)` and again with half of it while any rank's memory is short.

    The Accelerator, the model and whatever holds memory are to be made inside the function. A rank that
    runs out leaves the process group, which frees the others from the collective they wait in; then all
    form a new one.

    Args:
        reduce_batch_size_fn: gives the next size in place of the half; called on every rank, where all must give
            the same.

    Raises:
        ConfigError: no batch size fits, down to 1 (or to where `reduce_batch_size_fn` ends, with 0).
        CollectiveMismatch: the ranks came to different sizes.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    inner = function

    @functools.wraps(inner)
    def search(*args: Any, **kwargs: Any) -> R:
        size = last = starting_batch_size
        while size > 0:
            token = _size.set(size)
            try:
                result = inner(size, *args, **kwargs)
                _join_others()
                if _spread():
                    meet_in_search(join())
                return result
            except (RuntimeError, MemoryError) as error:
                if not _someone_ran_out(error):
                    raise
            finally:
                _size.reset(token)
            # Outside the handler: there the traceback still holds the frames and their tensors.
            _start_over()
            last, size = size, size // 2 if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise ConfigError(f"no batch size fits, not even {last}; began at {starting_batch_size}")

    return search


def meet_in_search(world: World) -> None:
    """Within a search: waits until all ranks are here with the same batch size; one that ran out before breaks it up.

    At its end, and where an Accelerator begins: the groups it makes next could not be broken up.
    """
    size = _size.get()
    if size is not None and world.size > 1:
        exchange_objects("find_executable_batch_size", None, world=world, signature=f"a batch size of {size}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, the device's or the host's, was not enough."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _join_others() -> None:
    """Where no Accelerator was made yet on this rank: the others wait for it to join the group."""
    if not dist.is_initialized() and read_environment().size > 1:
        join()


def _someone_ran_out(error: BaseException) -> bool:
    mine = is_out_of_memory(error)
    if mine:
        _join_others()
    if not _spread():
        return mine
    if "nccl" in str(dist.get_backend_config()):
        # The others wait inside a kernel, from which leaving the group does not free them.
        return False
    store = dist.distributed_c10d._get_default_store()
    if mine:
        store.set(_KEY, "1")
    return mine or store.check([_KEY])


def _start_over() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if _spread():
        rank, size, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        # Keys of the old group must not be met again: the new one's live under a name of their own.
        store = dist.distributed_c10d.PrefixStore(
            "after-out-of-memory", dist.distributed_c10d._get_default_store()
        )
        name = dist.distributed_c10d._get_default_group().group_name
        dist.destroy_process_group()
        gloo.let_go(name)  # this is what frees the others
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
