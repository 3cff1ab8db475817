"""What both strategies on XLA share: parameters move by being made anew, and a step is a graph that is cut.

Sources: torch_xla 2.9, `torch_xla.sync`, its documentation on tied weights (`.to` makes new parameters), its counters
(`debug/metrics.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.model.hooks import Hook
from nbaccel.core.model.tied import find_tied_parameters, retie_parameters
from nbaccel.core.xla.recompiles import Recompiles

__all__ = ["Traced", "graphs_compiled", "on_cpu"]


@final
class Traced:
    """A loop's models and optimizers on an XLA device.

    A module's parameters move by being made anew: the user's are kept, so that optimizers made with them find the new
    ones. The graph is cut behind each optimizer step, and behind each step of an evaluation, which has none: it would
    grow with the number of batches. It is watched how often one is compiled.

    From here on a backward is all of it in the thread that asks for it. Autograd's own threads hold what they computed
    last a moment longer than the call: when the graph is cut, that would be one of its results on one rank and not on
    another, whose graphs would differ then.
    """

    def __init__(self, device: torch.device) -> None:
        torch.autograd.set_multithreading_enabled(False)
        self._device = device
        self._moved: dict[int, tuple[Tensor, nn.Parameter]] = {}
        """The user's parameters by id, which stays theirs as long as they live, with those on the device."""
        self._recompiles = Recompiles(graphs_compiled)
        self._cut: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._evaluated: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """What was called without gradients since the graph was last cut, or a backward."""

    def move(self, module: nn.Module) -> None:
        """Move a module in place, its ties kept."""
        tied, old = find_tied_parameters(module), dict(module.named_parameters())
        module.to(self._device)
        retie_parameters(module, tied)
        new = dict(module.named_parameters())
        for name, parameter in old.items():
            if new[name] is not parameter:
                self._moved[id(parameter)] = parameter, new[name]

    def watch(self, module: nn.Module) -> None:
        """Note when and with what `module` is called; compile and run what making it ready has traced."""
        module.register_forward_pre_hook(Hook(self._called))
        self._recompiles.watch(module)  # behind the cut: this call's inputs are the next graph's
        torch_xla.sync()

    def _called(self, module: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled():
            if module in self._evaluated:
                self._evaluated.clear()
                torch_xla.sync()
                self._recompiles.evaluated()
            self._evaluated.add(module)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """Let it step the parameters on the device, and compile and run what was traced each time it has stepped;
        the host goes on at once."""
        self._point(optimizer)
        if optimizer not in self._cut:
            self._cut.add(optimizer)
            optimizer.register_step_post_hook(self._stepped)
        return optimizer

    def _point(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for at, parameter in enumerate(group["params"]):
                if id(parameter) in self._moved:
                    group["params"][at] = moved = self._moved[id(parameter)][1]
                    state = optimizer.state.pop(parameter, {})
                    if state:
                        optimizer.state[moved] = {key: _beside(value, moved) for key, value in state.items()}

    def _stepped(self, *_: Any) -> None:
        self._evaluated.clear()
        torch_xla.sync()
        self._recompiles.stepped()

    def upload(self, tensors: list[Tensor], shardings: Sequence[Any] | None = None) -> list[Tensor]:
        """Copies of a batch's CPU tensors on the device, in one transfer. Any thread may call it: they are data and no
        part of a graph, so that what is cut meanwhile is what it would be without them. Source: torch_xla 2.9,
        `core/xla_model.py` (`send_cpu_data_to_device`).

        Args:
            shardings: how each is divided over the devices (SPMD), or None for it whole.
        """
        if not tensors:
            return []
        sent: list[Tensor] = torch_xla._XLAC._xla_tensors_from_aten(
            tensors, [str(self._device)] * len(tensors), None if shardings is None else list(shardings)
        )
        self._recompiles.brought(sent)
        return sent

    def backward(self, loss: Tensor, options: Mapping[str, Any]) -> None:
        """`loss.backward`."""
        self._evaluated.clear()  # called in a step of training, as a teacher is: not the place for a cut
        self._recompiles.within_training()
        loss.backward(**options)  # type: ignore[no-untyped-call]


def on_cpu(module: nn.Module) -> dict[str, Any]:
    """Its state dict, the values fetched."""
    return {name: value.cpu() for name, value in module.state_dict().items()}


def graphs_compiled() -> int:
    """How many graphs this process has compiled: those not found in a cache."""
    return int(torch_xla._XLAC._xla_counter_value("UncachedCompile") or 0)


def _beside(value: Any, parameter: nn.Parameter) -> Any:
    """A part of an optimizer's state where its parameter is; step counts stay on the CPU."""
    moves = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return value.to(parameter.device) if moves else value
