"""How many operations each part of a model takes for a batch: one forward pass on tensors without numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nbaccel.core.model.unchanged import unchanged
from nbaccel.core.nested import leaves, map_tensors
from nbaccel.core.offload.parts import Part
from nbaccel.errors import ConfigError

__all__ = ["count_operations"]

_GROUPED: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""What a mixture of experts computes with; the counter passes over it, and without numbers it takes bfloat16 alone."""


def count_operations(parts: Sequence[Part], model: nn.Module, batch: Any) -> int:
    """Sets the parts' operations to those of one forward pass with `batch`.

    Args:
        batch: what the model is called with: a tensor, a tuple of arguments, or a mapping of keywords.

    Returns:
        The tokens of that pass: the most rows that a table of embeddings was asked for, without tables the
        samples of the batch. The parts' operations are per token.

    Raises:
        ConfigError: the model cannot run with it.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={_GROUPED: _grouped_operations} if _GROUPED else None
    )
    spent: dict[nn.Module, int] = {}
    running: list[list[int]] = []
    """Of the modules that run, each inside the one before: operations when it began, and those of parts inside."""
    looked_up = 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal looked_up
        running.append([counter.get_total_flops(), 0])
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and args:
            looked_up = max(looked_up, args[0].numel())

    def end(module: nn.Module, args: Any, output: Any) -> None:
        began, inside = running.pop()
        taken = counter.get_total_flops() - began
        spent[module] = spent.get(module, 0) + taken - inside
        if running:
            running[-1][1] += taken

    handles = []
    for module in dict.fromkeys(part.module for part in parts):
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        with unchanged(model):
            _run(model, batch, counter)
    except Exception as error:  # whatever the user's model does
        raise ConfigError(
            f"{type(model).__name__} cannot be run on the batch to count its operations: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    tensors = [value for _, value in leaves(batch) if isinstance(value, Tensor)]
    tokens = looked_up or next((len(tensor) for tensor in tensors if tensor.ndim), 1)
    for part in parts:
        part.cost = replace(part.cost, flops=spent.pop(part.module, 0) / max(1, tokens))
    return max(1, tokens)


def _grouped_operations(left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Each row of `left` is multiplied with one matrix of `right`."""
    return 2 * math.prod(left) * right[-1]


@final
class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Says the shape of what grouped products give, in any type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _GROUPED is not None and func.overloadpacket is _GROUPED:
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, batch: Any, counter: FlopCounterMode) -> None:
    """One forward pass; everything is taken to be on the CPU, and has no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

        known: dict[int, Tensor] = {}
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        state = {name: known.setdefault(id(tensor), fake(tensor)) for name, tensor in named}
        given = map_tensors(fake, batch)
        args: tuple[Any, ...] = (
            () if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
        )
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know its fused layers
        try:
            with _GroupedProducts(), counter:  # type: ignore[no-untyped-call]
                functional_call(model, state, args, dict(given) if isinstance(given, Mapping) else None)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
