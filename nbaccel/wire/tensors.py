"""Torch's tensors, modules and compiled functions on their way to another process.

Torch offers pickle no out-of-band buffers: here each storage is sent once, beside the pickle, and views and ties stay.
"""

from __future__ import annotations

import ctypes
import inspect
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from nbaccel.errors import PayloadError
from nbaccel.whole import gathered, is_divided

__all__ = ["TorchReducer", "function_made_anew", "same"]


@final
class TorchReducer:
    """How torch's objects go into one pickle.

    Args:
        outward: from the notebook to ranks, as `payload.pack` says.
        seen: to look only: it is given each tensor and module that is met, of which nothing is sent.
    """

    def __init__(self, *, outward: bool, seen: list[Any] | None = None) -> None:
        self.on_device = False
        """Whether opening the pickle needs an accelerator."""
        self._outward, self._seen = outward, seen
        self._storages: dict[int, _Storage] = {}

    def reduce(self, obj: Any) -> tuple[Any, ...] | None:
        """What pickle is to do with `obj`; None where it knows itself."""
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "nn"):
            return None
        tensor = isinstance(obj, torch.Tensor)
        if tensor or isinstance(obj, torch.nn.Module):
            if self._seen is not None:
                self._seen.append(obj)
                return same, (None,)
            return self._tensor(obj) if tensor else self._module(obj)
        kind = type(obj)
        if kind is torch.storage.TypedStorage:
            return _typed, (self._storage(obj._untyped_storage), obj.dtype)
        if kind is torch.UntypedStorage:
            return same, (self._storage(obj),)
        return None

    def _tensor(self, tensor: Any) -> tuple[Any, ...] | None:
        if not self._outward and id(tensor) in gathered:
            return same, (gathered[id(tensor)][1],)
        if not self._outward and is_divided(tensor):
            raise PayloadError(
                f"this {type(tensor).__name__} of shape {tuple(tensor.shape)} is divided among the ranks (FSDP, tensor "
                "parallel, DeepSpeed); send its full_tensor(), or accelerator.get_state_dict(model), called on every "
                "rank, in its place"
            )
        return self._without_storage(tensor) if tensor.device.type in ("xla", "tpu") else None

    def _module(self, module: Any) -> tuple[Any, ...] | None:
        if not self._outward:
            if (inner := _inner_module(module)) is not None:
                return same, (inner,)
            if _is_divided(module):
                raise PayloadError(
                    f"the parameters of this {type(module).__name__} are divided among the ranks (FSDP, tensor "
                    "parallel, DeepSpeed); send accelerator.get_state_dict(model), called on every rank, in its place"
                )
        return _parametrization_of(module)

    def _without_storage(self, tensor: Any) -> tuple[Any, ...]:
        """A tensor whose values only the runtime can read, as torch_xla's and TorchTPU's are."""
        import torch

        self.on_device |= self._outward
        values, needs_grad = tensor.detach().cpu(), tensor.requires_grad
        if not self._outward and not isinstance(tensor, torch.nn.Parameter):
            return same, (values.requires_grad_(needs_grad),)
        return _placed, (values, tensor.device.type if self._outward else "cpu", type(tensor), needs_grad)

    def _storage(self, storage: Any) -> _Storage:
        """The one stand-in of a storage, however many tensors share it."""
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = _Storage(storage, keep_device=self._outward)
            self.on_device |= self._outward and storage.device.type != "cpu"
        return self._storages[key]


@final
class _Storage:
    """Stands for one torch storage in a pickle; becomes an UntypedStorage over the received buffer."""

    def __init__(self, storage: Any, *, keep_device: bool) -> None:
        self._device = storage.device.type if keep_device else "cpu"
        self._storage = storage.cpu()  # itself when it is there already

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        size = self._storage.nbytes()
        memory = (ctypes.c_char * size).from_address(self._storage.data_ptr()) if size else bytearray()
        return _load_storage, (pickle.PickleBuffer(memory), self._device)


def _load_storage(buffer: Any, device: str) -> Any:
    import torch

    view = memoryview(buffer)
    empty = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    storage = torch.frombuffer(view.cast("B"), dtype=torch.uint8).untyped_storage() if view.nbytes else empty
    # without an index: the receiving rank's own device
    return storage if device == "cpu" else storage.to(device=torch.device(device))


def _typed(storage: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
        wrap_storage=storage, dtype=dtype, _internal=True
    )


def _placed(values: Any, device: str, kind: type, needs_grad: bool) -> Any:
    """A tensor, or a parameter, on the receiver's own device of this kind."""
    import torch

    if device == "xla":
        import torch_xla

        values = values.to(torch_xla.device())
    elif device == "tpu":
        values = values.to(device)
    if issubclass(kind, torch.nn.Parameter):
        return torch.nn.Parameter(values, requires_grad=needs_grad)
    return values.requires_grad_(needs_grad)


def same(value: Any) -> Any:
    """Its argument: what an object is that another stands for in the pickle."""
    return value


def function_made_anew(function: Any) -> tuple[Any, ...] | None:
    """How to make anew a function of torch's, or one that `torch.compile` has made of the notebook's; else None."""
    if function.__module__ == "torch._utils" and function.__name__ == "_rebuild_tensor_v3":
        return same, (_rebuild_tensor,)
    return _compiled_of(function)


def _rebuild_tensor(storage: Any, *rest: Any) -> Any:
    """A tensor of a dtype that has no typed storage (uint16, float8): torch sends it with a plain one, and takes
    that back in a typed one only."""
    import torch

    return torch._utils._rebuild_tensor_v3(_typed(storage, torch.uint8), *rest)  # type: ignore[no-untyped-call]


def _compiled_of(function: Any) -> tuple[Any, ...] | None:
    original = getattr(function, "_torchdynamo_orig_callable", None)
    if not isinstance(original, types.FunctionType) or original.__module__ != "__main__":
        return None
    held = inspect.getclosurevars(function).nonlocals
    context, backend = held.get("self"), held.get("callback")
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    options = {
        "dynamic": getattr(context, "_dynamic", None),
        "fullgraph": getattr(context, "fullgraph", False),
    }
    return _compiled, (original, {**options, "backend": backend or "inductor"})


def _compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    import torch

    return torch.compile(function, **options)


def _parametrization_of(module: Any) -> tuple[Any, ...] | None:
    """How to make anew a module whose weight is computed (`weight_norm`, `spectral_norm`); else None.

    Torch gives each a class of its own, which no other process has, and lets it be copied but not pickled.
    """
    kind = type(module)
    if kind.__module__ != "torch.nn.utils.parametrize" or "parametrizations" not in module._modules:
        return None
    (base,) = kind.__bases__
    get_state = getattr(base, "__getstate__", None)
    state = vars(module) if get_state is None else get_state(module)
    return _parametrized, (base, tuple(module.parametrizations)), state


def _parametrized(kind: type, names: Iterable[str]) -> Any:
    from torch.nn.utils import parametrize

    module: Any = object.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _inner_module(module: Any) -> Any | None:
    """The user's own module inside a wrapper that only makes sense in its rank, else None."""
    torch = sys.modules["torch"]
    if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        return module.module
    if type(module).__name__ in ("_FabricModule", "DeepSpeedEngine"):
        return module.module
    return getattr(module, "_orig_mod", None)  # what torch.compile keeps the original under


def _is_divided(module: Any) -> bool:
    # Where ZeRO divides the optimizer only, its place there hangs on each parameter.
    return any(is_divided(p) or hasattr(p, "_hp_mapping") for p in module.parameters())
