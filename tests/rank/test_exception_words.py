"""What is added to an exception's words that say little to who wrote the loop."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from nbaccel import notebook_launcher
from nbaccel.rank.failure import describe

pytestmark = pytest.mark.usefixtures("clean")


def mixed() -> str:
    torch.distributed.init_process_group("gloo")
    part = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()])
    try:
        torch.ones(2) * part.requires_grad_() + torch.ones(2)
    except RuntimeError as error:
        return describe(error).message
    return ""


def test_words_when_parameters_are_used_outside_their_model_say_so() -> None:
    (said,) = notebook_launcher(mixed, num_processes=1)
    assert said.startswith("RuntimeError: aten.")
    assert said.endswith("See 'What does not go' in docs/strategies.md.")


def frozen_within_a_pass() -> str:
    torch.distributed.init_process_group("gloo")
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model = torch.nn.parallel.DistributedDataParallel(layers)
    layers[0].requires_grad_(False)
    try:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return describe(error).message
    return ""


def test_words_when_layers_are_frozen_within_a_pass_say_so() -> None:
    (said,) = notebook_launcher(frozen_within_a_pass, num_processes=1)
    assert said.endswith("Accelerator(ddp=DDPOptions(find_unused_parameters=True)) allows both.")


def test_words_of_other_errors_are_their_own() -> None:
    assert describe(RuntimeError("no such thing")).message == "RuntimeError: no such thing"
