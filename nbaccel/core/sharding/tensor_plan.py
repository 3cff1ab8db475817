"""How the matrices of a model are divided over ranks that compute each layer together.

A column-wise linear layer gives each rank a part of its outputs, a row-wise one takes a part of its inputs
and adds up; a pair of them costs one exchange (Megatron-LM, arXiv:1909.08053). Attention's heads are
divided with its column-wise projections, so their number must be divisible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nbaccel.core.model.tied import find_tied_parameters, retie_parameters
from nbaccel.errors import ConfigError
from nbaccel.parallel import TensorParallel

__all__ = ["divide", "draw_alike", "styles_of"]

_LLAMA = {
    r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)": "column",
    r".*\.(o_proj|down_proj)": "row",
    r"(.*\.)?embed_tokens": "embedding",
    r"lm_head": "column_gathered",
}
# GPT-2 keeps queries, keys and values in one matrix, whose parts do not fall on heads: it is gathered again.
_GPT2 = {
    r".*\.attn\.c_attn": "column_gathered",
    r".*\.attn\.c_proj": "row_whole",
    r".*\.mlp\.c_fc": "column",
    r".*\.mlp\.c_proj": "row",
    r"(.*\.)?wte": "embedding",
    r"lm_head": "column_gathered",
}
_DEFAULTS = (_LLAMA, _GPT2)
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head")


def styles_of(model: nn.Module, options: TensorParallel, size: int) -> dict[nn.Module, ParallelStyle]:
    """How each module is divided over `size` ranks.

    Raises:
        ConfigError: the plan names a module that is not there or cannot be divided, "auto" does not know the
            model, or the heads cannot be divided.
    """
    named = dict(model.named_modules())
    if isinstance(options.plan, str):
        found = _known(named)
        _check_heads(model, size)
    else:
        found = _asked(named, options.plan)
    _check_sizes(named, found, size)
    return {named[name]: _made(style, named[name]) for name, style in found.items()}


def _known(named: Mapping[str, nn.Module]) -> dict[str, Any]:
    for patterns in _DEFAULTS:
        found = _matching(named, patterns)
        if "column" in found.values() and "row" in found.values():
            return found
    raise ConfigError(
        "tensor_parallel: plan='auto' knows the blocks of Llama (q_proj, …, down_proj) and GPT-2 (c_attn, c_fc, "
        "c_proj), and this model has neither; give TensorParallel(plan={'layers.*.fc1': 'column', "
        "'layers.*.fc2': 'row'})"
    )


def _matching(named: Mapping[str, nn.Module], patterns: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in named:
        for pattern, style in patterns.items():
            if re.fullmatch(pattern, name):
                found[name] = style
    return found


def _asked(named: Mapping[str, nn.Module], plan: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for asked, style in plan.items():
        pattern = re.escape(asked).replace(r"\*", "[^.]+")
        matched = _matching(named, {pattern: style})
        if not matched:
            raise ConfigError(f"tensor_parallel: the plan names {asked!r}, and the model has no such module")
        found.update(matched)
    return found


def _check_heads(model: nn.Module, size: int) -> None:
    config = getattr(model, "config", None)
    for name in _HEADS:
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"tensor_parallel: size {size} does not divide the model's {heads} heads ({name}); use one of "
                f"{', '.join(map(str, divisors))}"
            )


def _check_sizes(named: Mapping[str, nn.Module], found: Mapping[str, Any], size: int) -> None:
    for name, style in found.items():
        weight = getattr(named[name], "weight", None)
        if not isinstance(style, str) or style == "sequence":
            continue
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ConfigError(
                f"tensor_parallel: {name!r} is a {type(named[name]).__name__}, which has no matrix to divide"
            )
        if not isinstance(named[name], (nn.Linear, nn.Embedding)) and not _transposed(named[name]):
            kind = type(named[name])
            raise ConfigError(
                f"tensor_parallel: {name!r} is a {kind.__module__}.{kind.__name__} and no nn.Linear or nn.Embedding; "
                "its forward may use more than its matrix, as adapters do. Name other layers in a plan, or use "
                "strategy 'fsdp' or 'ddp'"
            )
        length = weight.shape[_dimension(style, named[name])]
        if style in ("column", "row") and length % size:
            raise ConfigError(
                f"tensor_parallel: size {size} does not divide the {length} features that {name!r} is cut along; use "
                "a size that does, or leave it out of the plan"
            )


def _transposed(module: nn.Module) -> bool:
    """transformers' Conv1D is a linear layer with its weight the other way round."""
    return type(module).__name__ == "Conv1D"


def _dimension(style: str, module: nn.Module) -> int:
    along_outputs = style.startswith("column") or style == "embedding"
    return 0 if along_outputs != _transposed(module) else 1


def _made(style: Any, module: nn.Module) -> ParallelStyle:
    if not isinstance(style, str):
        if not isinstance(style, ParallelStyle):
            raise ConfigError(f"tensor_parallel: {style!r} is no style; use a name or a torch ParallelStyle")
        return style
    if style == "sequence":
        return SequenceParallel()
    if _transposed(module):
        return _Transposed(style)
    if style == "column":
        return ColwiseParallel()
    if style == "column_gathered":
        return ColwiseParallel(output_layouts=Replicate())
    if style == "row_whole" or style == "embedding":
        return RowwiseParallel(input_layouts=Replicate())
    return RowwiseParallel()


@final
class _Transposed(ParallelStyle):
    """Column- and row-wise division of a layer that computes x @ weight + bias."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self._style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        column = self._style.startswith("column")
        taken = Shard(-1) if self._style == "row" else Replicate()
        computed: Any = Replicate() if column else Shard(-1)
        given: Any = Shard(-1) if self._style == "column" else Replicate()

        def partition(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            places = {"weight": Shard(1 if column else 0), "bias": Shard(0) if column else Replicate()}
            for own, parameter in list(part.named_parameters(recurse=False)):
                part.register_parameter(own, _divided(parameter, mesh, places[own]))

        def enter(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, (taken,), run_check=False).redistribute(
                placements=(computed,)
            )

        def leave(part: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=(given,)).to_local()

        return distribute_module(module, device_mesh, partition, enter, leave)


def _divided(parameter: Tensor, mesh: DeviceMesh, place: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter, mesh, [place]), requires_grad=parameter.requires_grad)


def divide(
    modules: Iterable[nn.Module],
    styles: Mapping[nn.Module, ParallelStyle],
    model: nn.Module,
    mesh: DeviceMesh,
) -> None:
    """Divides those of `modules` that have a style over the mesh, which has one dimension; ties stay."""
    listed = list(modules)
    tied = [names for names in find_tied_parameters(model) if _all_in(names, model, listed)]
    for module in listed:
        if module in styles:
            parallelize_module(module, mesh, styles[module])
    retie_parameters(model, tied)


def _all_in(names: Sequence[str], model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    return all(model.get_submodule(name.rpartition(".")[0]) in modules for name in names)


def draw_alike(mesh: DeviceMesh) -> None:
    """Gives the ranks of the mesh one random state: what they all compute must be dropped out alike."""
    state = torch.get_rng_state()
    group = mesh.get_group()
    source = dist.get_global_rank(group, 0)
    box: list[Any] = [state, torch.initial_seed()]
    dist.broadcast_object_list(box, src=source, group=group)
    torch.manual_seed(box[1])  # the accelerators' generators too
    torch.set_rng_state(box[0])
