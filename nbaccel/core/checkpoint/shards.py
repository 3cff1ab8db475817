"""Which rank writes which piece of which tensor, and how the pieces are found again on any number of ranks.

torch.distributed.checkpoint (DCP) plans both ways: its save planner removes what several ranks hold and
spreads it over them, its load planner intersects what was saved with what is wanted. The files are ours
(DCP's own are pickles): one safetensors file per rank, and an index in JSON. DCP is imported where it is used: it takes
a second, which those who never save need not wait for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch

from nbaccel.core.checkpoint.crew import Crew
from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.tensorfile import (
    Entry,
    Layout,
    Spec,
    data_bytes,
    lay_out,
    read_header,
    read_tensor,
)
from nbaccel.errors import CheckpointError
from nbaccel.whole import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

__all__ = ["INDEX", "Index", "Plan", "fingerprint", "make_plan", "read_into", "shard_file", "sources"]

INDEX = "index.json"


def shard_file(rank: int) -> str:
    """The file that holds what `rank` wrote."""
    return f"shards-{rank:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What this rank writes. Valid as long as `fingerprint` gives the same on every rank."""

    items: Mapping[str, WriteItem]
    """By the name the piece has in this rank's file."""
    layout: Layout
    index: bytes
    """The index of all ranks' pieces, on rank 0; empty elsewhere."""


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """What a plan depends on: names, dtypes, shapes and how each tensor is laid over the ranks."""
    return tuple(
        (name, t.dtype, t.shape, t.placements, t.device_mesh) if is_dtensor(t) else (name, t.dtype, t.shape)
        for name, t in tensors.items()
    )


def make_plan(
    tensors: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    of_rank_zero: Collection[str],
    crew: Crew,
) -> Plan:
    """Agrees with all ranks on who writes what. To be called by all of them.

    Args:
        tensors: everything this rank holds, by name.
        aliases: names of tensors that are another's memory, with that other's name; written once.
        of_rank_zero: plain tensors that only rank 0 is to write.

    Raises:
        CheckpointError: the ranks hold different shapes under one name.
    """
    # Rank 0's word: a rank whose shards are empty cannot see that two tensors are one.
    aliases = crew.share(dict(aliases))
    mine = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in aliases and (crew.rank == 0 or name not in of_rank_zero or is_dtensor(tensor))
    }
    planner = _save_planner(mine, crew)
    plans = crew.gather(planner.create_local_plan())
    answer: tuple[list[SavePlan], str] = ([], "")
    index = b""
    if crew.rank == 0:
        try:
            parts, metadata = planner.create_global_plan(plans)
            index = _index_json(parts, metadata, aliases)
            answer = (parts, "")
        except (ValueError, AssertionError, RuntimeError) as error:
            answer = ([], str(error))
    parts, problem = crew.share(answer)
    if problem:
        raise CheckpointError(f"the ranks' tensors cannot be saved together: {problem}")
    items = {
        _piece_name(item.index.fqn, _offsets(item), _is_whole(item)): item for item in parts[crew.rank].items
    }
    specs = {name: Spec(_data(i).properties.dtype, tuple(_data(i).chunk.sizes)) for name, i in items.items()}
    return Plan(items=items, layout=lay_out(specs, {"format": "pt"}), index=index)


def sources(plan: Plan, tensors: Mapping[str, torch.Tensor], crew: Crew) -> dict[str, torch.Tensor]:
    """The pieces this rank writes, as views of `tensors` wherever they are."""
    planner = _save_planner(tensors, crew)
    return {
        name: cast(torch.Tensor, planner.resolve_data(item)).detach() for name, item in plan.items.items()
    }


def _save_planner(tensors: Mapping[str, torch.Tensor], crew: Crew) -> DefaultSavePlanner:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=crew.rank == 0)
    return planner


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None, "only tensors are planned"
    return item.tensor_data


def _offsets(item: WriteItem) -> tuple[int, ...]:
    return tuple(_data(item).chunk.offsets)


def _is_whole(item: WriteItem) -> bool:
    return tuple(_data(item).chunk.sizes) == tuple(_data(item).size)


def _piece_name(name: str, offsets: Iterable[int], whole: bool) -> str:
    """The name of a piece in its file: the tensor's own when it is the whole of it."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def _index_json(plans: list[SavePlan], metadata: Metadata, aliases: Mapping[str, str]) -> bytes:
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data = _data(item)
            entry = tensors.setdefault(
                item.index.fqn,
                {"dtype": str(data.properties.dtype), "shape": list(data.size), "chunks": []},
            )
            entry["chunks"].append([list(data.chunk.offsets), list(data.chunk.sizes), rank])
    return json.dumps({"tensors": tensors, "aliases": dict(aliases)}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What tensors a checkpoint holds and where their pieces lie."""

    metadata: Metadata
    files: Mapping[str, tuple[str, ...]]
    """By tensor name: the file that holds each of its chunks."""
    aliases: Mapping[str, str]

    @classmethod
    def from_json(cls, data: bytes) -> Index:
        """The index in `data`; tied tensors appear under each of their names."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            Metadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        document = json.loads(data)
        tensors, files = {}, {}
        for name, entry in document["tensors"].items():
            tensors[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, entry["dtype"].removeprefix("torch."))),
                size=torch.Size(entry["shape"]),
                chunks=[ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _ in entry["chunks"]],
            )
            files[name] = tuple(shard_file(rank) for _, _, rank in entry["chunks"])
        for alias, name in document["aliases"].items():
            tensors[alias], files[alias] = tensors[name], files[name]
        return cls(metadata=Metadata(dict(tensors)), files=files, aliases=document["aliases"])

    def tensor(self, name: str) -> TensorStorageMetadata:
        """What is known of one tensor."""
        return cast("TensorStorageMetadata", self.metadata.state_dict_metadata[name])

    @classmethod
    def of_whole(cls, files: Mapping[str, Mapping[str, Entry]]) -> Index:
        """The index of tensors that stand whole in files, whose headers are given by file name."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            Metadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        tensors, places = {}, {}
        for file, header in files.items():
            for name, entry in header.items():
                size = torch.Size(entry.shape)
                tensors[name] = TensorStorageMetadata(
                    properties=TensorProperties(dtype=entry.dtype),
                    size=size,
                    chunks=[ChunkStorageMetadata(torch.Size([0] * len(size)), size)],
                )
                places[name] = (file,)
        return cls(metadata=Metadata(dict(tensors)), files=places, aliases={})

    @property
    def names(self) -> list[str]:
        """All tensors, tied ones under each of their names."""
        return list(self.metadata.state_dict_metadata)


def read_into(
    targets: Mapping[str, torch.Tensor], index: Index, folder: Path, filesystem: FileSystem
) -> None:
    """Fills this rank's part of each target from the pieces any ranks wrote.

    Raises:
        CheckpointError: a file cannot be read; its name is in the message.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), index.metadata, is_coordinator=True)
    by_file: dict[str, list[tuple[ReadItem, str]]] = {}
    for item in planner.create_local_plan().items:
        fqn, number = item.storage_index.fqn, _chunk_number(index, item)
        chunk = index.tensor(fqn).chunks[number]
        whole = chunk.sizes == index.tensor(fqn).size
        piece = _piece_name(index.aliases.get(fqn, fqn), chunk.offsets, whole)
        by_file.setdefault(index.files[fqn][number], []).append((item, piece))
    for name, wanted in by_file.items():
        try:
            with filesystem.open(folder / name) as handle:
                _read_file(handle, wanted, planner)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {folder}: {name} cannot be read: {error}") from error


def _chunk_number(index: Index, item: ReadItem) -> int:
    if item.storage_index.index is not None:
        return item.storage_index.index
    chunks = index.tensor(item.storage_index.fqn).chunks
    return next(i for i, chunk in enumerate(chunks) if chunk.offsets == item.storage_index.offset)


@torch.no_grad()
def _read_file(handle: BinaryIO, wanted: list[tuple[ReadItem, str]], planner: DefaultLoadPlanner) -> None:
    header = read_header(handle)
    for item, piece in sorted(wanted, key=lambda pair: header[pair[1]].begin):
        target = planner.resolve_tensor(item).detach()
        rows, rest = _byte_range(header[piece], tuple(item.storage_offsets), tuple(item.lengths))
        if (
            rest is None
            and target.device.type == "cpu"
            and target.is_contiguous()
            and target.dtype == rows.dtype
        ):
            _read_bytes(handle, rows, target)
        else:
            source = read_tensor(handle, rows)
            for dim, (offset, length) in enumerate(rest or ()):
                source = source.narrow(dim, offset, length)
            target.copy_(source)
        planner.commit_tensor(item, target)


def _byte_range(
    entry: Entry, offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[Entry, list[tuple[int, int]] | None]:
    """The rows of `entry` that must be read, and the box to cut from them where rows are not enough."""
    if not entry.shape:
        return entry, None
    row = entry.num_bytes // entry.shape[0] if entry.shape[0] else 0
    rows = Entry(
        entry.dtype, (lengths[0], *entry.shape[1:]), entry.begin + offsets[0] * row, lengths[0] * row
    )
    if entry.shape[1:] == lengths[1:]:
        return rows, None
    return rows, [(0, lengths[0]), *zip(offsets[1:], lengths[1:], strict=True)]


def _read_bytes(handle: BinaryIO, entry: Entry, target: torch.Tensor) -> None:
    view = data_bytes(target)
    handle.seek(entry.begin)
    done = 0
    while done < entry.num_bytes:
        count = handle.readinto(view[done:])  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise ValueError(f"it ends {entry.num_bytes - done} bytes too early")
        done += count
