"""What accelerate's scripts take from `accelerate.test_utils`; what talks to other ranks is by our means."""

from __future__ import annotations

import torch
from accelerate.test_utils.testing import assert_exception
from accelerate.test_utils.training import RegressionDataset, RegressionModel

from nbaccel.compat.accelerate import PartialState, gather

__all__ = ["RegressionDataset", "RegressionModel", "are_the_same_tensors", "assert_exception", "torch_device"]

torch_device = "cpu"


def are_the_same_tensors(tensor: torch.Tensor) -> bool:
    """Whether every rank has the same one."""
    mine = tensor[None].to(PartialState().device)
    return all(torch.equal(one, mine[0]) for one in gather(mine))
