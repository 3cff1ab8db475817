"""Models that are divided by layers: which rank has which, and their state as one model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbaccel.core.checkpoint import Entries, ModelState, OptimizerState, Saved
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.comm.collectives import gather_object
from nbaccel.core.world import World
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["StagedModel", "StagedOptimizer", "divide_layers", "gather_stages"]


def divide_layers(model: nn.Module, count: int, split: Sequence[str] | None) -> list[list[str]]:
    """The names of the layers of each of `count` stages.

    Args:
        split: names of the layers that begin stages 1, 2, …; None: stages of about as many parameters.

    Raises:
        ConfigError: not an nn.Sequential, fewer layers than stages, or `split` names something else.
    """
    if not isinstance(model, nn.Sequential):
        raise ConfigError(
            f"strategy 'pipeline' takes an nn.Sequential, whose layers it divides, not a {type(model).__name__}; write "
            "the model as one: each layer's output is the next one's input"
        )
    names = list(model._modules)
    if len(names) < count:
        raise ConfigError(f"a model of {len(names)} layers cannot be divided into {count} stages; use fewer")
    begins = _balanced(model, count) if split is None else _named(names, count, split)
    return [names[a:b] for a, b in zip(begins, [*begins[1:], len(names)], strict=True)]


def _named(names: Sequence[str], count: int, split: Sequence[str]) -> list[int]:
    unknown = [name for name in split if name not in names]
    if unknown:
        raise ConfigError(f"pipeline: split names {unknown[0]!r}; the model's layers are {', '.join(names)}")
    begins = [0, *(names.index(name) for name in split)]
    if len(begins) != count or sorted(set(begins)) != begins:
        raise ConfigError(
            f"pipeline: split is {list(split)}; for {count} stages it must name {count - 1} layers, in order and not "
            "the first"
        )
    return begins


def _balanced(model: nn.Sequential, count: int) -> list[int]:
    """Where stages begin so that the largest has as few parameters as can be; each has a layer."""
    weights = [sum(p.numel() for p in layer.parameters()) for layer in model]
    least: dict[tuple[int, int], tuple[int, list[int]]] = {}

    def best(begin: int, stages: int) -> tuple[int, list[int]]:
        """The largest stage's parameters, and where stages begin, for the layers from `begin` on."""
        if stages == 1:
            return sum(weights[begin:]), [begin]
        if (begin, stages) not in least:
            ways = []
            for end in range(begin + 1, len(weights) - stages + 2):
                rest, begins = best(end, stages - 1)
                ways.append((max(sum(weights[begin:end]), rest), [begin, *begins]))
            least[begin, stages] = min(ways)
        return least[begin, stages]

    return best(0, count)[1]


@torch.no_grad()
def gather_stages(stage: nn.Module, world: World, line: dist.ProcessGroup, *, keep: bool) -> dict[str, Any]:
    """The whole state dict on the CPU, one tensor after another; ranks that do not `keep` get an empty one.

    Called by all ranks together. `line`: the ranks of one model, in the order of its stages.
    """
    own: dict[str, Any] = stage.state_dict()
    listed = gather_object({name: _spec(value) for name, value in own.items()}, world=world)
    state: dict[str, Any] = {}
    for place, rank in enumerate(dist.get_process_group_ranks(line)):
        for name, (shape, dtype, plain) in listed[rank].items():
            if shape is None:
                state[name] = plain
                continue
            value = own[name].contiguous() if rank == world.rank else None
            if value is None:
                value = torch.empty(shape, dtype=dtype, device=world.device)
            dist.broadcast(value.reshape(-1).view(torch.uint8), group=line, group_src=place)
            state[name] = value.cpu() if keep else None
    return state if keep else {}


def _spec(value: Any) -> tuple[torch.Size | None, torch.dtype | None, Any]:
    return (value.shape, value.dtype, None) if isinstance(value, Tensor) else (None, None, value)


@final
class StagedModel:
    """A stage's parameters and buffers, under the names of the whole model: each rank writes and reads its own.

    Args:
        names: those of the whole model.
    """

    def __init__(self, stage: nn.Module, names: Collection[str]) -> None:
        self._state, self._names = ModelState(stage), names

    def entries(self) -> Entries:
        return replace(self._state.entries(), plain={}, of_rank_zero=())

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        if found := differences(self._names, saved.shapes):
            raise CheckpointError(f"this is another model's checkpoint: {found}")
        return self._state.targets(_of(saved, self._state.entries().tensors))

    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        self._state.finish(tensors, _of(saved, tensors))


def _of(saved: Saved, names: Collection[str]) -> Saved:
    return Saved(
        shapes={name: shape for name, shape in saved.shapes.items() if name in names},
        dtypes={name: dtype for name, dtype in saved.dtypes.items() if name in names},
        plain={},
    )


@final
class StagedOptimizer:
    """An optimizer's state by the names of the whole model; what is not a tensor is put together from all ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module], world: World) -> None:
        self._state, self._world = OptimizerState(optimizer, modules), world

    def entries(self) -> Entries:
        entries = self._state.entries()
        parts = gather_object(entries.plain, world=self._world)
        merged: dict[str, Any] = {
            "groups": [dict(group) for group in parts[0]["groups"]],
            **{kind: {name: v for part in parts for name, v in part[kind].items()} for kind in _BY_NAME},
        }
        for number, group in enumerate(merged["groups"]):
            listed = [name for part in parts for name in part["groups"][number]["params"]]
            group["params"] = list(dict.fromkeys(listed))
        return replace(entries, plain=merged)

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        return self._state.targets(self._own(saved))

    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        self._state.finish(tensors, self._own(saved))

    def _own(self, saved: Saved) -> Saved:
        """What was saved of this stage's parameters."""
        groups = [dict(group) for group in saved.plain["groups"]]
        own = {name for group in self._state.entries().plain["groups"] for name in group["params"]}
        for group in groups:
            group["params"] = [name for name in group["params"] if name in own]
        by_name = {
            kind: {name: v for name, v in saved.plain[kind].items() if name in own or kind == "other"}
            for kind in _BY_NAME
        }
        return replace(saved, plain={"groups": groups, **by_name})


_BY_NAME = ("keys", "rest", "other")
"""What `OptimizerState` keeps beside the groups, each by a parameter's name."""
