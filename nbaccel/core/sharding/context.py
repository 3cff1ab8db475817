"""Context parallelism: long sequences are cut, and each rank of a group holds one piece of every tensor.

Attention still sees the whole sequence: torch's ring of keys and values goes around the group (Ring Attention,
arXiv:2310.01889). What is cut and put together again is named by the loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["divide_context", "make_context_mesh"]


def make_context_mesh(world: World, size: int, tensor_size: int) -> DeviceMesh:
    """The ranks that share this one's sequence."""
    sizes = (world.size // (size * tensor_size), size, tensor_size)
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("data", "context", "tensor"))
    return mesh["context"]


def divide_context(
    mesh: DeviceMesh | None, buffers: Sequence[Tensor], dims: Sequence[int], keep_cut: set[Tensor]
) -> AbstractContextManager[Any]:
    """A context in which each of `buffers` is this rank's piece along its dimension of `dims`, and attention runs
    around the group. None: nothing is divided.

    Args:
        keep_cut: buffers that need not be put together again afterwards.

    Raises:
        ConfigError: a sequence does not divide into equal pieces.
    """
    if len(buffers) != len(dims):
        raise ConfigError(
            f"there are {len(buffers)} buffers and {len(dims)} sequence dimensions; give one for each"
        )
    if mesh is None or not buffers:
        return contextlib.nullcontext()
    from torch.distributed.tensor.experimental import context_parallel

    # each rank takes a piece from the front and one from the back: causal attention costs more further back
    pieces = 2 * mesh.size()
    for buffer, dim in zip(buffers, dims, strict=True):
        if buffer.shape[dim] % pieces:
            raise ConfigError(
                f"a sequence of {buffer.shape[dim]} cannot be divided over {mesh.size()} ranks; pad it to a multiple "
                f"of {pieces}"
            )
    return context_parallel(
        mesh, buffers=list(buffers), buffer_seq_dims=list(dims), no_restore_buffers=keep_cut
    )
