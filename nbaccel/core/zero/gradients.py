"""Gradients between the last backward of a window and the step, wherever ZeRO keeps them: their norm, their scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nbaccel.core.zero.flat import flats
from nbaccel.core.zero.swapping import gradients_in_memory
from nbaccel.errors import ConfigError

__all__ = ["added_up", "clear", "clip_values", "drop", "forget_norm", "norm_for_step", "scale"]

_NORMS = ("_get_norm_groups", "scaled_global_norm")
"""DeepSpeed's methods: of stage 3, which gives one norm for each sub-group; of stages 1 and 2."""


def norm_for_step(zero: Any) -> Tensor:
    """The norm of all gradients, still scaled; it is not finite where one of them is not.

    The step that follows would compute it once more, and is given it.
    """
    name = next(name for name in _NORMS if hasattr(zero, name))
    found = getattr(zero, name)()
    setattr(zero, name, lambda: found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    norms = torch.stack([torch.as_tensor(part) for part in parts])
    norms = norms.where(norms >= 0, torch.nan)  # DeepSpeed says -1 of what is not finite
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def forget_norm(zero: Any) -> None:
    """Gradients are others now: DeepSpeed computes their norm itself."""
    for name in _NORMS:
        vars(zero).pop(name, None)


@contextmanager
def added_up(zero: Any) -> Iterator[None]:
    """Around a backward: its gradients are added to those that are there, as `.grad` adds them.

    DeepSpeed adds up before the end of a window only. At the end a second backward would put its gradients in the
    place of the first one's in stages 1 and 2; in stage 3 so would one that no forward goes before.
    """
    forget_norm(zero)
    zero.clear_backward_seen_flag()  # as a forward does: what follows is a micro-step of its own
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        yield
        _bring_along(zero)
        return
    zero.setup_buckets()  # as its first hook does; a loss that reaches no parameter calls none
    apart = [n for n in zero.averaged_gradients if not zero._use_compact_grad_partition_buffer(n)]
    kept = {number: zero.averaged_gradients[number] for number in apart}
    zero.averaged_gradients |= dict.fromkeys(apart)
    with _added_up_beside_parameters(zero), _reducing_what_waits(zero):
        yield
    for number, gradients in kept.items():
        if gradients is not None:
            for gradient, new in zip(gradients, zero.averaged_gradients[number] or (), strict=False):
                gradient.add_(new)
            zero.averaged_gradients[number] = gradients


@contextmanager
def _added_up_beside_parameters(zero: Any) -> Iterator[None]:
    """The same under offload, where the end of a window copies gradients to the float32 parameters."""
    if not _offloads(zero):
        yield
        return
    groups = [flat.tensor.grad for flat in flats(zero)]
    names = {
        name: zero.grad_position[name]
        for name in zero.norm_for_param_grads
        if not zero._use_compact_grad_partition_buffer(zero.grad_position[name][0])
    }
    kept = {number: groups[number].clone() for number, *_ in names.values()}
    for number in kept:
        groups[number].zero_()  # else what this backward does not use would be counted twice
    yield
    _bring_along(zero)
    if zero.is_gradient_accumulation_boundary():
        # Else the next one would add gradients that wait in main memory since another window.
        zero.micro_step_id = -1
    for number, gradients in kept.items():
        groups[number].add_(gradients)
    for name, (number, _, start, count) in names.items():
        zero.norm_for_param_grads[name] = groups[number].narrow(0, start, count).norm(2)


def _bring_along(zero: Any) -> None:
    """Under offload the last backward of a window copies to the float32 parameters what it reaches itself; this copies
    the gradients that only earlier micro-steps have given, of a branch or an expert that was not chosen again."""
    if not _offloads(zero) or not zero.is_gradient_accumulation_boundary():
        return
    copied = zero.norm_for_param_grads.keys()
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        name = "_offload_boundary_param_ids"
        done = {p.ds_id for group in zero.fp16_groups for p in group if zero.get_param_id(p) in copied}
        finish = zero._finalize_offload_gradient_accumulation
    else:
        name, done = "_offload_accumulated_param_ids", set(copied)
        finish = zero._finalize_cpu_offload_gradient_accumulation
    reached = getattr(zero, name)
    if reached - done:
        setattr(zero, name, reached - done)
        finish()
        setattr(zero, name, reached)


@contextmanager
def _reducing_what_waits(zero: Any) -> Iterator[None]:
    """With overlapped communication stage 1 sends the gradients that the last backward of a window reaches, and would
    leave out those that wait since an earlier micro-step; without, it sends all when that backward is done."""
    overlaps = zero.overlap_comm
    if overlaps and not zero.partition_gradients and zero.is_gradient_accumulation_boundary():
        parameters = [p for group in zero.bit16_groups for p in group]
        zero.overlap_comm = all(zero.get_gradient_for_reduction(p) is None for p in parameters)
    yield
    zero.overlap_comm = overlaps


@torch.no_grad()
def scale(zero: Any, ratio: float | Tensor) -> None:
    """Multiplies them."""
    for kept in zero.averaged_gradients.values():
        for gradient in kept or ():
            gradient.mul_(ratio)
    if not _offloads(zero):
        return
    # Under offload they are beside the float32 parameters already, and their norms were taken on the way.
    factor = float(ratio)
    for sub_group, flat in enumerate(flats(zero)):
        with gradients_in_memory(zero, sub_group):
            if flat.tensor.grad is not None:
                flat.tensor.grad.mul_(factor)
    for name, norm in zero.norm_for_param_grads.items():
        zero.norm_for_param_grads[name] = norm * factor


@torch.no_grad()
def clip_values(zero: Any, clip_value: float) -> None:
    """Clips each number.

    Raises:
        ConfigError: they are offloaded, and their norms, which the step would take, are those of before.
    """
    if _offloads(zero):
        raise ConfigError(
            "clip_grad_value_ cannot go with an offloaded optimizer under ZeRO; use clip_grad_norm_, or leave "
            "offload_optimizer out"
        )
    forget_norm(zero)
    limit = clip_value * float(zero.loss_scale)
    for kept in zero.averaged_gradients.values():
        for gradient in kept or ():
            gradient.clamp_(-limit, limit)


@torch.no_grad()
def clear(zero: Any) -> None:
    """Zeros what DeepSpeed keeps gradients in from step to step (stage 3, and under offload): it writes the new ones
    there, and would step a parameter that has none by those of its last use."""
    kept: Tensor | None = getattr(zero, "grad_partitions_flat_buffer", None)
    if kept is not None:
        kept.zero_()
    if not _offloads(zero):
        return
    # stages 1 and 2, of micro-steps before a window's last
    waiting = getattr(zero, "accumulated_grads_in_cpu", {})
    for gradient in [*waiting.values(), *(flat.tensor.grad for flat in flats(zero))]:
        if gradient is not None:
            gradient.zero_()


def drop(zero: Any) -> None:
    """Forgets them, and what was to be clipped; the next backward is the first of its window.

    DeepSpeed does so within its step only: without one it would add the next ones to them.
    """
    forget_norm(zero)
    if _offloads(zero) or any(kept is not None for kept in zero.averaged_gradients.values()):
        clear(zero)  # else the step has done it
    zero.clip_grad = 0.0
    zero.zero_grad(set_to_none=True)
    if not hasattr(zero, "fp32_partitioned_groups_flat"):  # stages 1 and 2; that of stage 3 has done it
        zero.micro_step_id = -1
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
    if _offloads(zero):
        zero.reset_cpu_buffers()
        # stage 3 has the one, stages 1 and 2 the other
        zero._offload_boundary_param_ids = zero._offload_accumulated_param_ids = set()


def _offloads(zero: Any) -> bool:
    return bool(getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False)))
