"""The seam between the training loop and how a model is spread over the ranks.

What the loop does for every strategy, in this order:

    prepare       `wrap` for each model, with the optimizers given in the same call; `adopt` for each
                  optimizer that was given without its model
    a micro-step  `set_sync(False)` where it does not end its window, the forward, `backward`;
                  at a window's end `scale_gradients` where it had to be weighed, `clip_grad_norm`, and the
                  step of the optimizer that `wrap` or `adopt` gave back
    saving        `model_state` and `optimizer_state`, whose tensors go by the names of the user's model,
                  whole or as DTensors, so that any other strategy can load them

A strategy imports no other one; `assembly` chooses it and gives it what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from nbaccel.core.checkpoint import ModelState, OptimizerState, Sharded
from nbaccel.core.data.upload import Upload
from nbaccel.core.load_model import load_module
from nbaccel.errors import ConfigError
from nbaccel.whole import is_divided

__all__ = ["DataAxis", "Strategy", "clip_local_norm", "refuse_divided", "scale_whole_gradients", "trainable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAxis:
    """This rank's place among those that see different data; ranks that share one model share a place."""

    rank: int
    size: int


class Strategy(ABC):
    """How models are spread. One per Accelerator; complete when constructed.

    What has a body here is right wherever parameters and gradients are ordinary tensors or DTensors of the module
    itself; what could be wrong without a word has none.
    """

    name: str
    """As in `RunConfig.strategy`."""
    plain: bool = False
    """One process whose backward is `loss.backward()` and whose gradients are whole in `.grad`: the loop
    calls autograd itself, and neither `backward` nor `set_sync`."""
    handles_precision: bool = False
    """Whether what `wrap` gives computes in the asked precision by itself, loss scaling included; else the
    loop autocasts around it and scales."""
    replicates: bool = False
    """Whether every rank holds the whole model, so that ranks can train apart for a while."""
    alike: bool = True
    """Whether every rank prepares a model of the same parameters, whatever it keeps of them."""
    apart: Collection[nn.Module] = ()
    """Models whose ranks need not be equal: within `no_sync`, or divided by layers."""
    context_mesh: DeviceMesh | None = None
    """The ranks that share each sequence; None: every rank has whole ones."""
    upload: Upload | None = None
    """How a thread of the loader's moves batches to the device ahead of the loop; None: as the device has it."""

    @property
    @abstractmethod
    def data_axis(self) -> DataAxis:
        """Over what loaders divide the samples and gradients are averaged."""

    @abstractmethod
    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        """The module to call in the loop, with rank 0's parameters, and what to step for each optimizer.

        Called by all ranks together. Parameters on the meta device are materialised here.

        Args:
            optimizers: those prepared in the same call that hold parameters of `module`; they are given back
                as they are, pointed at other parameters, or replaced.
            place: move the module to this rank's device.

        Raises:
            ConfigError: the module or an optimizer cannot be spread so; what to do instead is said.
        """

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """What to step for an optimizer that was prepared without a model.

        Raises:
            ConfigError: it holds parameters that wrapping has replaced beyond recall.
        """
        return optimizer

    def forget(self) -> None:  # noqa: B027
        """Lets go of every model and optimizer; what is wrapped next is the first again."""

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The user's module inside what `wrap` gave; any other module as it is."""
        return module

    @abstractmethod
    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        """Whether the next forward and backward of `module` end with gradients averaged over the data axis."""

    @abstractmethod
    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients stay on their rank."""

    @abstractmethod
    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        """Makes the next backward synchronise although its forward ran under `no_sync`.

        `outputs` are what backward will start from; they show which parameters were used.
        """

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        """Adds the gradients of `loss`, already weighed and scaled, to those of `modules`.

        `options` are those of `Tensor.backward`.
        """
        loss.backward(**options)  # type: ignore[no-untyped-call]

    def add_over_ranks(self, total: Tensor) -> dist.Work | None:
        """Adds up a tensor of this rank's device or of the CPU over all ranks, in place; what to wait for, if
        anything."""
        work: dist.Work | None = dist.all_reduce(total, async_op=True)
        return work

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:  # noqa: B027
        """Other parameters of a wrapped module want gradients than when it was wrapped, or than at the last call.

        Called before a pass over a prepared loader, by all ranks together if all made the same change.

        Args:
            changed: the parameters that do now and did not, or the other way round, by the user's names.

        Raises:
            ConfigError: the strategy cannot follow; what to do instead is said.
        """

    def pipeline_step(self, modules: Sequence[nn.Module], batch: Any, factor: float) -> Tensor:
        """Forward and backward of a batch in one, where they alternate; the loss, 0-d, the same on all stages.

        Args:
            factor: what this batch's gradients are multiplied with.

        Raises:
            ConfigError: forward and backward are two here, or the batch is no pair of tensors.
        """
        raise ConfigError(
            f"pipeline_step belongs to strategy=Pipeline(...), and the strategy is {self.name!r}: call the model and "
            "backward(loss)"
        )

    def scale_gradients(self, modules: Sequence[nn.Module], ratio: float | Tensor) -> None:
        """Multiplies synchronised gradients; called after the last backward of a window only."""
        scale_whole_gradients(modules, ratio)

    @abstractmethod
    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        """A context in which ranks may have unequal numbers of batches.

        Raises:
            ConfigError: every rank is needed in each step.
        """

    @abstractmethod
    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clips gradients to a total norm over the whole model; returns the norm before clipping, 0-d."""

    @torch.no_grad()
    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        """Clips each number of the gradients to at most `clip_value` either way."""
        dense = []
        for parameter in parameters:
            if parameter.grad is None or not parameter.grad.is_sparse:
                dense.append(parameter)
            elif (numbers := _numbers(parameter)) is not None:
                numbers.clamp_(-clip_value, clip_value)
        nn.utils.clip_grad_value_(dense, clip_value)

    def left_step_out(self, optimizer: Optimizer) -> bool:
        """Whether the last step of what `wrap` or `adopt` gave for an optimizer was left out, and the parameters are
        as they were."""
        return False

    @abstractmethod
    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        """The whole state dict under the user's names. Called by all ranks together.

        With `rank_zero_only` sharded strategies put it together on the CPU of rank 0, one tensor after
        another, and other ranks may get an empty one.
        """

    def load_weights(self, module: nn.Module, folder: str | Path, *, strict: bool) -> str:
        """Fills a wrapped module from safetensors files, of which each rank keeps its part only. Says how names were
        understood, if not as they stand.

        Raises:
            CheckpointError: nothing there, or of another model; nothing has been changed then.
        """
        return load_module(self.unwrap(module), folder, strict=strict)

    def model_state(self, module: nn.Module) -> Sharded:
        """A wrapped module as a checkpoint takes it: parameters and buffers by the user's names."""
        return ModelState(module)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        """An optimizer as a checkpoint takes it, in the canonical form that `OptimizerState` writes.

        "state.<parameter name>.<key>" for each tensor, whole or a DTensor of the parameter's global shape;
        groups by parameter name.
        """
        return OptimizerState(optimizer, modules)


def trainable(module: nn.Module) -> bool:
    """Whether any parameter of `module` wants a gradient."""
    return any(p.requires_grad for p in module.parameters())


def refuse_divided(named: Iterable[tuple[str, Tensor]], strategy: str) -> None:
    """Looks for parameters of which each rank has a part, before what needs whole ones fails over them.

    Raises:
        ConfigError: there is one; it is named.
    """
    for name, parameter in named:
        if is_divided(parameter):
            raise ConfigError(
                f"{name} is divided over the ranks already (a {type(parameter).__name__}), as by torch's "
                f"parallelize_module or fully_shard, or by another strategy, and strategy {strategy!r} begins with "
                "whole parameters: give prepare the plain model, built anew"
            )


def clip_local_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Clips where every rank holds all of every gradient; the numbers of `torch.nn.utils.clip_grad_norm_`."""
    listed = list(parameters)
    grads = [p.grad for p in listed if p.grad is not None]
    if any(grad.is_sparse for grad in grads):
        return _clip_with_sparse(listed, max_norm, float(norm_type))
    kinds = {(grad.device, grad.dtype) for grad in grads}
    if len(kinds) != 1 or next(iter(kinds))[0].type not in ("cpu", "cuda") or {*map(type, grads)} != {Tensor}:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(listed, max_norm, norm_type)
        return norm
    # its operations without its sorting by device and type, which takes longer than they do for a small model
    norm_type = float(norm_type)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, norm_type)), norm_type)
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


@torch.no_grad()
def _clip_with_sparse(parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """What torch does with dense gradients and not with sparse ones, whose other numbers are 0 and change no norm."""
    grads = [numbers for numbers in map(_numbers, parameters) if numbers is not None]
    norms = [torch.linalg.vector_norm(grad, norm_type).to(grads[0].device) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return norm


def _numbers(parameter: Tensor) -> Tensor | None:
    """What a gradient holds: of a sparse one, the numbers of each of its places."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()


@torch.no_grad()
def scale_whole_gradients(modules: Sequence[nn.Module], ratio: float | Tensor) -> None:
    """Multiplies what is in `.grad`."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in (p.grad for m in modules for p in m.parameters()):
        if grad is not None:
            # one call takes tensors of one kind: DTensors of one mesh, or plain ones
            groups.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    for grads in groups.values():
        torch._foreach_mul_(grads, ratio)
