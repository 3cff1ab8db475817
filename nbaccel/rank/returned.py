"""Models of which each rank holds a part, as a launch's return value: whole and plain, as the user wrote them.

FSDP2, tensor parallelism, DeepSpeed and pipelines. All ranks gather together, so they first tell each other what they
return.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from nbaccel.errors import PayloadError
from nbaccel.whole import assembled_by, is_divided, whole

__all__ = ["make_whole"]

_KEY = "nbaccel/returned"
_DIVIDERS = {"torch.distributed.fsdp", "torch.distributed.tensor", "deepspeed"}
_HANGERS = ("torch.distributed.", "deepspeed.", "nbaccel.")
_NOTHING = "nothing"
# What torch's `fully_shard` and DeepSpeed keep in a module, besides hooks and methods.
_MARKS = (
    "__composable_api_state_key",
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "ds_",
    "_external_params",
    "_original_parameters",
    "applied_pre_backward_ref_cnt",
)


def make_whole(value: Any, *, keep: bool) -> Any:
    """What the function returned, its divided models made whole where the value is wanted.

    Called on every rank once its function has returned; the models are changed in place. Only where all ranks return
    the same models they can be gathered.

    Raises:
        PayloadError: another rank returns none, or others.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or not _DIVIDERS & sys.modules.keys():
        return value
    models = [one for one in _modules_in(value) if _is_divided(one)]
    store = distributed.distributed_c10d._get_default_store()
    mine = _described(models) if models else _NOTHING
    store.set(f"{_KEY}/{distributed.get_rank()}", f"{int(keep)} {mine}")
    if not models:
        return value
    told = [_told_by(other, store).partition(" ") for other in range(distributed.get_world_size())]
    if not any(int(wanted) for wanted, _, _ in told):
        return value
    if others := [other for other, (_, _, theirs) in enumerate(told) if theirs != mine]:
        raise PayloadError(
            f"the function's return value cannot be sent back: the parameters of this {type(models[0]).__name__} are "
            f"divided among the ranks, which gather it together, but rank {others[0]} returns "
            f"{'no such model' if told[others[0]][2] == _NOTHING else 'another one'}. Return it on every rank, and say "
            "returns='rank0' if one copy is enough"
        )
    for model in models:
        _gather(model, keep=keep)
    return value


def _told_by(rank: int, store: Any) -> str:
    """What a rank told, as long as its function takes within the group's timeout; a Stop comes between two looks."""
    key, end = f"{_KEY}/{rank}", time.monotonic() + store.timeout.total_seconds()
    while True:
        try:
            store.wait([key], timedelta(seconds=1))
        except RuntimeError as error:
            if "timeout" not in str(error).lower():
                raise
            if time.monotonic() > end:
                raise PayloadError(
                    f"rank {rank} has not returned in {store.timeout.total_seconds():g} s, or had left the process "
                    "group: the parameters of the model that is returned here are divided among the ranks, which "
                    "gather it together"
                ) from None
        else:
            return str(store.get(key).decode())


def _modules_in(value: Any) -> Iterator[Any]:
    """The modules in it and in its lists, tuples, dictionaries and dataclasses."""
    nn = sys.modules["torch.nn"]
    if isinstance(value, nn.Module):
        yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = vars(value).values() if hasattr(value, "__dict__") else ()
    for one in inside:
        yield from _modules_in(one)


def _is_divided(module: Any) -> bool:
    return (
        module in assembled_by
        or any(_is_sharded(part) or _is_engine(part) for part in module.modules())
        or any(is_divided(parameter) for parameter in module.parameters())
        or any(is_divided(buffer) for buffer in module.buffers())
    )


def _is_sharded(module: Any) -> bool:
    sharding = sys.modules.get("torch.distributed.fsdp")
    return isinstance(module, getattr(sharding, "FSDPModule", ()))


def _is_engine(module: Any) -> bool:
    """Whether DeepSpeed has wrapped or changed it."""
    engines = sys.modules.get("deepspeed")
    return isinstance(module, getattr(engines, "DeepSpeedEngine", ())) or any(
        hasattr(parameter, "_hp_mapping") for parameter in module.parameters(recurse=False)
    )


def _described(models: list[Any]) -> str:
    told = hashlib.sha256()
    for model in models:
        if model in assembled_by:
            told.update(b"layers\n")
            continue
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            told.update(f"{name} {getattr(tensor, 'ds_shape', tensor.shape)} {is_divided(tensor)}\n".encode())
    return told.hexdigest()


def _gather(model: Any, *, keep: bool) -> None:
    """Whole tensors in place of the parts, and nothing left of what divided the model."""
    if model in assembled_by:
        assembled_by[model]()
    for part in model.modules():
        if _is_sharded(part):
            part.reshard()  # a forward without a backward has left it gathered
    made: dict[int, Any] = {}
    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = _plain(tensor, keep=keep)
                if tensor is not None and keep:
                    tensors[name] = made[id(tensor)]
    if keep:
        for part in model.modules():
            _undress(part)


def _plain(tensor: Any, *, keep: bool) -> Any:
    full = whole(tensor, keep=keep)
    parameter = sys.modules["torch.nn"].Parameter
    return parameter(full, tensor.requires_grad) if keep and isinstance(tensor, parameter) else full


def _undress(module: Any) -> None:
    """Take off what FSDP, tensor parallelism, DeepSpeed or a strategy of ours hung on it."""
    if _is_sharded(module):
        module.__class__ = type(module).__mro__[getattr(module, "_orig_cls_mro_index", 2)]
    module._parameters = dict(module._parameters)  # ZeRO's own kind gathers what is looked up
    attributes = vars(module)
    for name, held in list(attributes.items()):
        if name.endswith("_hooks") and isinstance(held, dict):
            for key in [key for key, hook in held.items() if _comes_from(hook, _HANGERS)]:
                del held[key]
        elif name.startswith(_MARKS) or _comes_from(held, "deepspeed."):
            del attributes[name]


def _comes_from(held: Any, packages: str | tuple[str, ...]) -> bool:
    """Whether an object, a function, a class, or what a method is bound to is of one of these packages."""
    function = getattr(held, "__func__", held)
    modules = (getattr(function, "__module__", None), type(getattr(held, "__self__", None)).__module__)
    return any(isinstance(module, str) and module.startswith(packages) for module in modules)
