"""What both strategies on XLA share: parameters move by being made anew, and a step is a graph that is cut.

Sources: torch_xla 2.9, `torch_xla.sync`, its documentation on tied weights (`.to` makes new parameters), its counters
(`debug/metrics.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, final

import torch
import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.recompiles import Recompiles
from nbaccel.core.tied import find_tied_parameters, retie_parameters

__all__ = ["Graphs", "Moved", "backward", "graphs_compiled"]


@final
class Moved:
    """Parameters that were moved to the device, by the user's, which are kept so that their ids stay their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parameters: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def move(self, module: nn.Module) -> None:
        """Move a module in place, its ties kept."""
        tied, old = find_tied_parameters(module), dict(module.named_parameters())
        module.to(self._device)
        retie_parameters(module, tied)
        new = dict(module.named_parameters())
        for name, parameter in old.items():
            if new[name] is not parameter:
                self._parameters[id(parameter)] = parameter, new[name]

    def point(self, optimizer: Optimizer) -> None:
        """Let it step the parameters that are on the device, in place of those it was made with."""
        for group in optimizer.param_groups:
            for at, parameter in enumerate(group["params"]):
                if id(parameter) in self._parameters:
                    group["params"][at] = moved = self._parameters[id(parameter)][1]
                    state = optimizer.state.pop(parameter, {})
                    if state:
                        optimizer.state[moved] = {key: _beside(value, moved) for key, value in state.items()}


@final
class Graphs:
    """Cuts the graph behind each optimizer step, and has an eye on how often one is compiled."""

    def __init__(self) -> None:
        self._recompiles = Recompiles(graphs_compiled)
        self._cut: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def watch(self, module: nn.Module) -> None:
        """Note what `module` is called with."""
        self._recompiles.watch(module)

    def cut_after(self, optimizer: Optimizer) -> None:
        """Compile and run what was traced, each time it has stepped; the host goes on at once."""
        if optimizer not in self._cut:
            self._cut.add(optimizer)
            optimizer.register_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        torch_xla.sync()
        self._recompiles.stepped()


def backward(loss: Tensor, options: Mapping[str, Any]) -> None:
    """`loss.backward`, all of it in this thread. Autograd's own threads hold what they computed last a moment
    longer than the call: when the graph is cut, that would be one of its results on one rank and not on another,
    whose graphs would differ then."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward(**options)  # type: ignore[no-untyped-call]


def graphs_compiled() -> int:
    """How many graphs this process has compiled: those not found in a cache."""
    return int(torch_xla._XLAC._xla_counter_value("UncachedCompile") or 0)


def _beside(value: Any, parameter: nn.Parameter) -> Any:
    """A part of an optimizer's state where its parameter is; step counts stay on the CPU."""
    moves = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return value.to(parameter.device) if moves else value
