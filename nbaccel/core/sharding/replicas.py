"""DistributedDataParallel set up anew within the same object, which the user's loop holds."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["set_up_anew"]


def set_up_anew(wrapped: DistributedDataParallel, fresh: DistributedDataParallel) -> None:
    """Gives `wrapped` the buckets and hooks of `fresh`, which was just made of the same module.

    What every module has stays: hooks the user put on it, and its own `forward`. So does whether it synchronises.
    """
    kept = {*vars(nn.Module()), "require_backward_grad_sync"}
    vars(wrapped).update({name: value for name, value in vars(fresh).items() if name not in kept})
