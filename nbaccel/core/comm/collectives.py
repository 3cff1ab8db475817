"""Ranks exchanging nested structures of tensors, checked so that a mismatch is an error and not a hang.

Every operation begins with one `frame` of fixed size from each rank: which operation, the hash of what
it brings, how many bytes. Small CPU payloads ride in that frame, so for them the check is free and the
frame is the whole operation; larger ones follow in a collective of their own, which no longer waits for
the frames once a call site has proven itself (see `MismatchCheck`). Payloads travel as bytes, so
every dtype a tensor can have can be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from nbaccel.core.comm.frames import (
    ROOM,
    CheckMode,
    Meeting,
    MismatchCheck,
    Unsent,
    all_gather_flat,
    caller,
    exchange_blobs,
    exchange_objects,
)
from nbaccel.core.comm.packing import as_bytes, pack, packed_size, unpack, unpack_rows
from nbaccel.core.nested import leaves, map_leaves, map_tensors
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = [
    "CheckMode",
    "MismatchCheck",
    "Reduction",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_module",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "gather_uneven",
    "pad_across_processes",
    "reduce",
    "scatter",
]

Reduction = Literal["mean", "sum", "max", "min", "none"]
T = TypeVar("T")

_NO_SUMS = (torch.int16, torch.uint16, torch.uint32, torch.uint64)  # torch or gloo has no sums of these
_TOP_BIT = torch.iinfo(torch.int64).min
_PACK_BELOW = 256 * 1024  # bytes; larger tensors gain nothing from being copied into one buffer


def gather(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Every rank's tensors concatenated along dimension 0 in rank order, on every rank.

    A tensor of shape [n, ...] becomes [size * n, ...]; a 0-d tensor becomes [size]. No gradient flows.

    Raises:
        CollectiveMismatch: the ranks' structures, shapes or dtypes differ.
        TypeError: a leaf is not a tensor.
    """
    tensors = _tensors_of(value, "gather")
    if world.size == 1:
        return _rebuild(value, [t.reshape(1) if t.ndim == 0 else t for t in tensors])
    stacked = _gather_stacked("gather", tensors, world, check, options="", paths=value)
    return _rebuild(value, [t if t.ndim == 1 else t.flatten(0, 1) for t in stacked])


def gather_uneven(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Like `gather`, for tensors whose dimension 0 differs between ranks: what was given, without padding."""
    tensors = [t.reshape(1) if t.ndim == 0 else t for t in _tensors_of(value, "gather")]
    if world.size == 1:
        return _rebuild(value, tensors)
    signature = "; ".join(f"{t.dtype} [n{''.join(f', {n}' for n in t.shape[1:])}]" for t in tensors)
    lengths = torch.tensor([t.shape[0] for t in tensors], dtype=torch.int64).view(torch.uint8)
    packed = pack([t.cpu() for t in tensors])
    blob = torch.cat([lengths, packed])
    blobs = exchange_blobs(
        "gather", blob, f"uneven|{signature}", world=world, describe=lambda: _describe(value, tensors)
    )
    parts: list[list[torch.Tensor]] = [[] for _ in tensors]
    for one in blobs:
        counts = one[: lengths.numel()].clone().view(torch.int64).tolist()
        shapes = [(count, *t.shape[1:]) for count, t in zip(counts, tensors, strict=True)]
        for column, piece in zip(parts, unpack(one[lengths.numel() :], tensors, shapes), strict=True):
            column.append(piece)
    return _rebuild(value, [torch.cat(p).to(t.device) for p, t in zip(parts, tensors, strict=True)])


def gather_object(value: Any, *, world: World, check: MismatchCheck | None = None) -> list[Any]:
    """One picklable object from each rank, as a list in rank order, on every rank."""
    return [value] if world.size == 1 else exchange_objects("gather_object", value, world=world)


def reduce(
    value: T,
    *,
    world: World,
    reduction: Reduction = "sum",
    scale: float = 1.0,
    check: MismatchCheck | None = None,
) -> T:
    """The sum, mean, maximum or minimum over the ranks, times `scale`, in a new structure on every rank.

    float16, bfloat16 and complex32 are accumulated in twice as many bits and given back in their own dtype; bools
    count as integers; the mean of integers is float32.

    Raises:
        CollectiveMismatch: the ranks' structures, shapes, dtypes or reductions differ.
        ConfigError: no such reduction, or the maximum or minimum of complex numbers.
    """
    if reduction not in ("mean", "sum", "max", "min", "none"):
        raise ConfigError(f"reduction is {reduction!r}; it must be 'mean', 'sum', 'max', 'min' or 'none'")
    tensors = _tensors_of(value, "reduce")
    if reduction == "none":
        return _rebuild(value, [t.clone() for t in tensors])
    ordered = reduction in ("max", "min")
    if ordered and any(t.is_complex() for t in tensors):
        raise ConfigError(
            f"reduce on rank {world.rank} got complex numbers, of which there is no {reduction}: give it their abs(), "
            "or torch.view_as_real(...) of them"
        )
    if world.size == 1:
        totals = [_widen(t, ordered).clone() for t in tensors]
    else:
        totals = _reduce_wide("reduce", tensors, world, check, reduction=reduction, paths=value)
    divisor = world.size if reduction == "mean" else 1
    return _rebuild(
        value, [_narrow(w, t.dtype, ordered, scale, divisor) for w, t in zip(totals, tensors, strict=True)]
    )


def broadcast(value: T, *, world: World, source: int = 0, check: MismatchCheck | None = None) -> T:
    """`source`'s tensors on every rank; the others give tensors of the same shapes (contents unused).

    Raises:
        CollectiveMismatch: the ranks' structures, shapes, dtypes or sources differ.
        ConfigError: there is no such rank.
    """
    _check_source("broadcast", source, world)
    tensors = _tensors_of(value, "broadcast")
    if world.size == 1:
        return _rebuild(value, [t.clone() for t in tensors])
    options = f"source {source}"
    small = _fits(tensors)
    if small:
        stacked = _gather_stacked("broadcast", tensors, world, check, options=options, paths=value)
        return _rebuild(value, [t[source].clone() for t in stacked])
    meeting = _meet("broadcast", tensors, world, check, options=options, paths=value)
    carried = [_to_carrier(tensor, world).contiguous().clone() for tensor in tensors]
    works = [dist.broadcast(as_bytes(t), src=source, async_op=True) for t in carried if t.numel()]
    _settle(meeting, works, carried, check)
    return _rebuild(value, [c.to(t.device) for c, t in zip(carried, tensors, strict=True)])


def broadcast_object_list(objects: list[Any], *, world: World, source: int = 0) -> list[Any]:
    """Replaces the elements of `objects` on every rank by those of `source`, and returns the list.

    Raises:
        CollectiveMismatch: the lists have different lengths.
        ConfigError: there is no such rank.
    """
    _check_source("broadcast_object_list", source, world)
    if world.size > 1:
        mine = objects if world.rank == source else None
        signature = f"a list of {len(objects)} from rank {source}"
        objects[:] = exchange_objects("broadcast_object_list", mine, world=world, signature=signature)[source]
    return objects


@torch.no_grad()
def broadcast_module(module: torch.nn.Module, *, world: World, source: int = 0) -> None:
    """Copies `source`'s parameters and buffers into every rank's module, in place."""
    tensors = [*module.parameters(), *module.buffers()]
    for mine, theirs in zip(tensors, broadcast(tensors, world=world, source=source), strict=True):
        mine.copy_(theirs)


def pad_across_processes(
    value: T, *, world: World, dim: int = 0, pad_index: float = 0, pad_first: bool = False
) -> T:
    """Each tensor padded along `dim` with `pad_index` to the longest of all ranks, so it can be gathered.

    Tensors without that dimension stay as they are.

    Raises:
        CollectiveMismatch: the ranks' tensors have different numbers of dimensions.
    """
    tensors = _tensors_of(value, "pad_across_processes")
    if world.size == 1:
        return value
    mine = [t.shape[dim] if -t.ndim <= dim < t.ndim else -1 for t in tensors]
    signature = f"tensors of {[t.ndim for t in tensors]} dimensions, along dimension {dim}"
    lengths = exchange_objects("pad_across_processes", mine, world=world, signature=signature)
    padded = []
    for index, tensor in enumerate(tensors):
        missing = max(one[index] for one in lengths) - mine[index]
        padded.append(tensor if missing == 0 else _pad(tensor, dim, missing, pad_index, pad_first))
    return _rebuild(value, padded)


def all_to_all(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Each tensor [size * n, ...] cut into `size` chunks; chunk i goes to rank i. Gives [size * n, ...].

    Raises:
        ConfigError: a first dimension cannot be cut into equal chunks.
        CollectiveMismatch: the ranks' structures, shapes or dtypes differ.
    """
    tensors = _tensors_of(value, "all_to_all")
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] % world.size:
            raise ConfigError(
                f"all_to_all on rank {world.rank} got shape {list(tensor.shape)}: its first dimension "
                f"must be a multiple of the number of ranks, {world.size}"
            )
    if world.size == 1:
        return _rebuild(value, [t.clone() for t in tensors])
    meeting = _meet("all_to_all", tensors, world, check, options="", paths=value)
    carried = [_to_carrier(tensor, world).contiguous() for tensor in tensors]
    received = [torch.empty_like(data) for data in carried]
    works = [
        dist.all_to_all_single(as_bytes(out), as_bytes(data), async_op=True)
        for out, data in zip(received, carried, strict=True)
        if data.numel()
    ]
    _settle(meeting, works, carried, check)
    return _rebuild(value, [out.to(t.device) for out, t in zip(received, tensors, strict=True)])


def scatter(value: T | None, *, world: World, source: int = 0) -> T:
    """Cuts `source`'s tensors along dimension 0, as evenly as possible; rank r gets piece r.

    `source`'s value decides structure, shapes and dtypes; the other ranks may give None. Pieces arrive on
    the device `source`'s tensors are on where that is the CPU, else on the rank's own device.

    Raises:
        ConfigError: there is no such rank.
        TypeError: on every rank, where a leaf of `source`'s is not a tensor.
    """
    _check_source("scatter", source, world)
    if world.size == 1:
        return cast(T, map_tensors(torch.Tensor.detach, value))
    outline: Any = None
    tensors: list[torch.Tensor] = []
    if world.rank == source:
        try:
            tensors = _tensors_of(value, "scatter")
            outline = map_tensors(lambda t: t.to("meta"), value), [t.device.type for t in tensors]
        except TypeError as error:
            outline = Unsent(f"something else than tensors: {error}")
    shape, kinds = exchange_objects("scatter", outline, world=world, signature=f"from rank {source}")[source]
    pieces = []
    for index, (blank, kind) in enumerate(zip(_tensors_of(shape, "scatter"), kinds, strict=True)):
        device = torch.device("cpu") if kind == "cpu" else world.device
        whole = tensors[index] if world.rank == source else None
        pieces.append(_scatter_one(whole, blank, device, world, source))
    return cast(T, _rebuild(shape, pieces))


def barrier(world: World) -> None:
    """Waits until every rank is here.

    Raises:
        CollectiveMismatch: another rank is in another collective.
    """
    if world.size > 1:
        nothing = torch.empty(0)
        Meeting("wait_for_everyone", "", world=world, payload=nothing, num_bytes=0, place=caller()).agree()


# --- pieces ----------------------------------------------------------------------------------------------


def _check_source(operation: str, source: int, world: World) -> None:
    if not 0 <= source < world.size:
        raise ConfigError(
            f"{operation} on rank {world.rank} was asked for from rank {source}; there are ranks 0 to {world.size - 1}"
        )


def _tensors_of(value: Any, operation: str) -> list[torch.Tensor]:
    tensors = []
    for path, leaf in leaves(value):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                f"{operation} moves tensors; {f'the value at {path}' if path else 'the value'} is "
                f"{type(leaf).__name__}. Use gather_object or broadcast_object_list for other objects."
            )
        if leaf.layout is not torch.strided:
            raise TypeError(f"{operation} moves dense tensors; {path or 'the value'} is {leaf.layout}")
        # A conjugate or a negative may be a flag on other numbers' memory, which is what travels.
        tensors.append(leaf.detach().resolve_conj().resolve_neg())
    return tensors


def _rebuild(value: T, tensors: Sequence[torch.Tensor]) -> T:
    supply = iter(tensors)
    return cast(T, map_leaves(lambda _: next(supply), value))


def _describe(value: Any, tensors: Sequence[torch.Tensor]) -> str:
    named = zip((path for path, _ in leaves(value)), tensors, strict=True)
    return ", ".join(
        f"{path} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}".strip()
        + (f" on {t.device.type}" if t.device.type != "cpu" else "")
        for path, t in named
    )


def _fits(tensors: Sequence[torch.Tensor]) -> bool:
    return packed_size(tensors) <= ROOM and all(t.device.type == "cpu" for t in tensors)


def _meet(
    operation: str,
    tensors: Sequence[torch.Tensor],
    world: World,
    check: MismatchCheck | None,
    *,
    options: str,
    paths: Any,
) -> Meeting | None:
    """The check of a collective too large for a frame; what is returned is still to be settled."""
    place = caller()
    due = check is None or check.due(place)
    if check is not None and check.mode == "never":
        return None
    said = _describe(paths, tensors)
    meeting = Meeting(
        operation,
        f"{said} ({options})" if options else said,
        world=world,
        payload=None,
        num_bytes=packed_size(tensors),
        place=place,
        behind=not due,
    )
    if not due:
        return meeting
    meeting.agree()
    return None


def _settle(
    meeting: Meeting | None,
    works: Sequence[Any],
    carried: Sequence[torch.Tensor],
    check: MismatchCheck | None,
) -> None:
    """Returns when the payloads have arrived (are queued, on a device), and the ranks were found to agree."""
    if meeting is not None:
        if check is not None and any(t.device.type != "cpu" for t in carried):
            check.later(meeting)  # the host must not wait for the other hosts
        else:
            meeting.agree()
    for work in works:
        work.wait()


def _gather_stacked(
    operation: str,
    tensors: Sequence[torch.Tensor],
    world: World,
    check: MismatchCheck | None,
    *,
    options: str,
    paths: Any,
) -> list[torch.Tensor]:
    """For each tensor of shape S the ranks' values as [size, *S]."""
    if _fits(tensors):
        said = _describe(paths, tensors)
        text = f"{said} ({options})" if options else said
        packed = pack(tensors)
        frames = Meeting(
            operation, text, world=world, payload=packed, num_bytes=packed.numel(), place=caller()
        ).agree()
        assert frames.payloads is not None  # equal signatures have equal sizes, so all of them fit
        return unpack_rows(frames.payloads, tensors)
    meeting = _meet(operation, tensors, world, check, options=options, paths=paths)
    carried = [_to_carrier(t, world) for t in tensors]
    one_buffer = (
        len(tensors) > 1
        and len({t.device for t in carried}) == 1
        and all(t.nbytes < _PACK_BELOW for t in carried)
    )
    sent = [pack(carried)] if one_buffer else [as_bytes(t.contiguous()) for t in carried]
    taken = [t.new_empty((world.size, t.numel())) for t in sent]
    works = [
        all_gather_flat(out.view(-1), data, async_op=True)
        for out, data in zip(taken, sent, strict=True)
        if data.numel()
    ]
    _settle(meeting, works, carried, check)
    if one_buffer:
        stacked = unpack_rows(taken[0], carried)
    else:
        stacked = [
            out.view(t.dtype).view(world.size, *t.shape) if t.numel() else t.new_empty((world.size, *t.shape))
            for out, t in zip(taken, carried, strict=True)
        ]
    return [s.to(t.device) for s, t in zip(stacked, tensors, strict=True)]


def _reduce_wide(
    operation: str,
    tensors: Sequence[torch.Tensor],
    world: World,
    check: MismatchCheck | None,
    *,
    reduction: Reduction,
    paths: Any,
) -> list[torch.Tensor]:
    """The reduction of each tensor in a dtype wide enough to hold it."""
    ordered = reduction in ("max", "min")
    if _fits(tensors):
        stacked = _gather_stacked(operation, tensors, world, check, options=reduction, paths=paths)
        by_rank = [_widen(s, ordered) for s in stacked]
        if ordered:
            return [getattr(s, f"a{reduction}")(0) for s in by_rank]
        return [s.sum(0, dtype=s.dtype) for s in by_rank]
    meeting = _meet(operation, tensors, world, check, options=reduction, paths=paths)
    op = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(reduction, dist.ReduceOp.SUM)
    wide = []
    for tensor in tensors:
        total = _widen(_to_carrier(tensor, world), ordered).contiguous()
        wide.append(total.clone() if total.data_ptr() == tensor.data_ptr() else total)
    works = [
        # gloo and NCCL add complex numbers as pairs of reals.
        dist.all_reduce(torch.view_as_real(t) if t.is_complex() else t, op=op, async_op=True)
        for t in wide
        if t.numel()
    ]
    _settle(meeting, works, wide, check)
    return [total.to(t.device) for total, t in zip(wide, tensors, strict=True)]


def _widen(tensor: torch.Tensor, ordered: bool) -> torch.Tensor:
    """In numbers that can be added up, or put in order: both are `_narrow`ed to what they stand for."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize <= 2:
        return tensor.float()
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    if tensor.dtype == torch.uint64:
        signed = tensor.view(torch.int64)  # equal sums, bit for bit; ordered alike with the top bit turned
        return signed ^ _TOP_BIT if ordered else signed
    if tensor.dtype == torch.bool or tensor.dtype in _NO_SUMS:
        return tensor.long()
    return tensor


def _narrow(
    total: torch.Tensor, dtype: torch.dtype, ordered: bool, scale: float, divisor: int
) -> torch.Tensor:
    if dtype == torch.uint64:
        total = (total ^ _TOP_BIT if ordered else total).view(dtype)
    if divisor != 1:
        total = total / divisor
    if scale != 1.0:
        total = total * scale
    own = dtype.is_floating_point or dtype.is_complex or (dtype in _NO_SUMS and not total.is_floating_point())
    return total.to(dtype) if own else total


def _to_carrier(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The tensor on a device the process group can send from."""
    if tensor.device.type == "cpu":
        return tensor.to(world.control_device)
    backend = world.backend or ""
    carried = tensor.device.type in backend or (
        ":" not in backend and world.device.type == tensor.device.type
    )
    return tensor if carried and backend != "gloo" else tensor.cpu()


def _pad(tensor: torch.Tensor, dim: int, missing: int, value: float, first: bool) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = missing
    filler = tensor.new_full(shape, value)
    return torch.cat([filler, tensor] if first else [tensor, filler], dim=dim)


def _scatter_one(
    whole: torch.Tensor | None, blank: torch.Tensor, device: torch.device, world: World, source: int
) -> torch.Tensor:
    """One tensor's piece for this rank; pieces are sent padded to the largest."""
    if blank.ndim == 0:
        raise TypeError("scatter cuts tensors along their first dimension; a 0-d tensor has none")
    lengths = [len(part) for part in torch.arange(blank.shape[0]).tensor_split(world.size)]
    longest = blank.new_empty((max(lengths), *blank.shape[1:]), device="meta")
    carrier = world.control_device if device.type == "cpu" or world.backend == "gloo" else device
    received = torch.empty(longest.shape, dtype=blank.dtype, device=carrier)
    pieces: list[torch.Tensor] | None = None
    if whole is not None:
        pieces = []
        for part in whole.to(carrier).tensor_split(world.size):
            padded = torch.zeros_like(received)
            padded[: len(part)] = part
            pieces.append(as_bytes(padded))
    if received.numel():
        dist.scatter(as_bytes(received), pieces, src=source)
    return received[: lengths[world.rank]].to(device)
