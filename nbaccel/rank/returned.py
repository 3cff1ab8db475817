"""Models and tensors of which each rank holds a part, as a launch's return value: whole and plain, as the user wrote
them.

FSDP2, tensor parallelism, DeepSpeed and pipelines; state dicts and optimizers too. All ranks gather together, so they
first tell each other what they return.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from nbaccel.errors import PayloadError
from nbaccel.whole import assembled_by, gathered, is_divided, whole
from nbaccel.wire.payload import tensors_and_modules

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


def make_whole(value: Any, *, keep: bool) -> None:
    """Gathers what the function returned: its divided models, and other divided tensors in it.

    Called on every rank once its function has returned. Where the value is wanted, models are changed in place, and
    the whole of another tensor is sent in its place. Only where all ranks return the same they can be gathered.

    Raises:
        PayloadError: another rank returns none, or others.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or not _DIVIDERS & sys.modules.keys():
        return
    models, tensors = _looked_up(value)
    own = {id(tensor) for model in models for *_, tensor in _tensors_of(model)}
    others = [tensor for tensor in tensors if is_divided(tensor) and id(tensor) not in own]
    store = distributed.distributed_c10d._get_default_store()
    mine = _described(models, others) if models or others else _NOTHING
    store.set(f"{_KEY}/{distributed.get_rank()}", f"{int(keep)} {mine}")
    if mine == _NOTHING:
        return
    told = [_told_by(other, store).partition(" ") for other in range(distributed.get_world_size())]
    if not any(int(wanted) for wanted, _, _ in told):
        return
    if odd := [rank for rank, (_, _, theirs) in enumerate(told) if theirs != mine]:
        raise PayloadError(_refusal(models, others, odd[0], none=told[odd[0]][2] == _NOTHING))
    made: dict[int, Any] = {}
    for model in models:
        replaced = _gather(model, keep=keep)
        made.update({id(tensor): replaced[id(tensor)] for tensor in tensors if id(tensor) in replaced})
    made.update({id(tensor): _plain(tensor, keep=keep) for tensor in others})
    if keep:
        gathered.update({id(tensor): (tensor, made[id(tensor)]) for tensor in tensors if id(tensor) in made})


def _refusal(models: list[Any], others: list[Any], rank: int, *, none: bool) -> str:
    """Of what cannot be gathered, since that rank returns none, or another."""
    kind, what = (
        ("model", f"the parameters of this {type(models[0]).__name__} are")
        if models
        else ("tensor", f"this {type(others[0]).__name__} of shape {tuple(others[0].shape)} is")
    )
    return (
        f"the function's return value cannot be sent back: {what} divided among the ranks, which gather it together, "
        f"but rank {rank} returns {f'no such {kind}' if none else 'another one'}. Return it on every rank, and say "
        "returns='rank0' if one copy is enough"
    )


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
                    "group: what is returned here is divided among the ranks, which gather it together"
                ) from None
        else:
            return str(store.get(key).decode())


def _looked_up(value: Any) -> tuple[list[Any], list[Any]]:
    """The models in it of which this rank holds a part; the tensors beside models (in a state dict, an optimizer)."""
    module = sys.modules["torch.nn"].Module
    found = tensors_and_modules(value)
    models = [one for one in found if isinstance(one, module) and _is_divided(one)]
    for model in models:
        for part in model.modules():
            if _is_sharded(part):
                part.reshard()  # a forward without a backward has left it gathered
    return models, [one for one in found if not isinstance(one, module)]


def _tensors_of(model: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Each parameter and buffer of it: where it is kept, its name there, itself."""
    for part in model.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in list(kept.items()):
                if tensor is not None:
                    yield kept, name, tensor


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


def _described(models: list[Any], others: list[Any]) -> str:
    told = hashlib.sha256()
    for model in models:
        if model in assembled_by:
            told.update(b"layers\n")
            continue
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            told.update(f"{name} {getattr(tensor, 'ds_shape', tensor.shape)} {is_divided(tensor)}\n".encode())
    for tensor in others:
        told.update(f"{getattr(tensor, 'ds_shape', tensor.shape)} {tensor.dtype}\n".encode())
    return told.hexdigest()


def _gather(model: Any, *, keep: bool) -> dict[int, Any]:
    """Whole tensors in place of the parts, and nothing left of what divided the model.

    Returns:
        The new tensors by the identity of the old, None where they are not kept.
    """
    if model in assembled_by:
        assembled_by[model]()
    made: dict[int, Any] = {}
    for kept, name, tensor in _tensors_of(model):
        if id(tensor) not in made:
            made[id(tensor)] = _plain(tensor, keep=keep)
        if keep:
            kept[name] = made[id(tensor)]
    if keep:
        for part in model.modules():
            _undress(part)
    return made


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
        elif name.startswith(_MARKS) or _comes_from(held, "deepspeed.") or _gathers(held):
            del attributes[name]


def _gathers(held: Any) -> bool:
    """Whether it is a method (`generate`) that torch's `register_fsdp_forward_method` has put into the module."""
    defined_in = getattr(getattr(held, "__func__", None), "__globals__", {}).get("__name__", "")
    return str(defined_in).startswith("torch.distributed.fsdp.")


def _comes_from(held: Any, packages: str | tuple[str, ...]) -> bool:
    """Whether an object, a function, a class, or what a method is bound to is of one of these packages."""
    function = getattr(held, "__func__", held)
    modules = (getattr(function, "__module__", None), type(getattr(held, "__self__", None)).__module__)
    return any(isinstance(module, str) and module.startswith(packages) for module in modules)
