"""From a folder back to the live objects: nothing is changed until everything has been verified and fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from nbaccel.core.checkpoint.contents import PLAIN, Contents, Saved, Sharded, Stateful
from nbaccel.core.checkpoint.crew import Crew
from nbaccel.core.checkpoint.divided import lay_out_as
from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.find import Found, candidates, resolve
from nbaccel.core.checkpoint.manifest import Manifest, check_bytes, check_sizes, read_manifest
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.checkpoint.shards import INDEX, Index, read_into
from nbaccel.core.checkpoint.small import divided_of, unpack
from nbaccel.core.checkpoint.tensorfile import read_header, read_tensor
from nbaccel.errors import CheckpointError

__all__ = ["Loaded", "find_newest", "load"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a load did."""

    path: Path
    step: int
    world_size: int
    """Ranks that had saved it."""
    extra: Mapping[str, Any]
    untouched: tuple[tuple[str, str], ...] = ()
    """Things that kept their present state, each with the reason."""
    later: Mapping[str, Any] = field(default_factory=dict)
    """States whose owners are yet to come, by name; those that `Contents.later` asked for."""


def find_newest(project_dir: Path, crew: Crew, filesystem: FileSystem) -> Found:
    """The newest checkpoint whose every byte is as it was written. Each rank reads a share of the files."""
    listed = crew.share(
        [(c.path, c.problem) for c in candidates(project_dir, filesystem)] if crew.rank == 0 else []
    )
    skipped = [(path, problem) for path, problem in listed if problem]
    for path, problem in listed:
        if problem:
            break
        error = _attempt(partial(_verify_share, path, crew, filesystem))[1]
        said = [text for text in crew.gather(None if error is None else str(error)) if text is not None]
        if not said:
            return Found(path=path, skipped=tuple(skipped))
        skipped.append((path, said[0]))
    return Found(path=None, skipped=tuple(skipped))


def load(
    folder: Path,
    contents: Contents[Sharded, Stateful],
    crew: Crew,
    filesystem: FileSystem,
    *,
    verify: bool,
    allow_pickle: bool,
    strict: bool,
) -> Loaded:
    """Loads `folder` into `contents` on all ranks together.

    Args:
        verify: read and compare every byte first.
        allow_pickle: let states that need it run code from the file.
        strict: things that are in `contents` and not in the checkpoint, or the other way round, are an error.

    Raises:
        CheckpointError: on every rank. Except when a thing's own `load_state_dict` fails, nothing was changed.
    """
    folder = _on_main(lambda: resolve(folder, filesystem), crew)
    if verify:
        crew.agree(_attempt(lambda: _verify_share(folder, crew, filesystem))[1], f"verifying {folder}")
    crew.agree(_attempt(lambda: [hook(folder) for hook in contents.before])[1], "a hook before the load")
    reading, error = _attempt(lambda: _Reading.open(folder, contents, crew, filesystem, allow_pickle, strict))
    crew.agree(error, f"loading {folder}")
    assert reading is not None
    crew.agree(_attempt(reading.fill)[1], f"reading {folder}")
    crew.agree(
        _attempt(lambda: reading.hand_over(contents))[1], f"loading {folder} (some states are changed)"
    )
    return Loaded(
        path=folder,
        step=reading.manifest.step,
        world_size=reading.manifest.world_size,
        extra=reading.manifest.extra,
        untouched=reading.untouched,
        later=reading.later,
    )


def _attempt(do: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The value, or the error that all ranks must hear of before anyone raises it."""
    try:
        return do(), None
    except Exception as error:  # noqa: BLE001 - the caller brings it to every rank
        return None, error


def _on_main(do: Callable[[], Path], crew: Crew) -> Path:
    value, error = _attempt(do) if crew.rank == 0 else (None, None)
    answer = crew.share((value, None if error is None else str(error)))
    if answer[0] is None:
        raise CheckpointError(str(answer[1])) from error
    return answer[0]


def _verify_share(folder: Path, crew: Crew, filesystem: FileSystem) -> None:
    """Reads every n-th byte's worth of files, n ranks together reading all of them."""
    manifest = read_manifest(folder, filesystem)
    check_sizes(folder, manifest, filesystem)
    loads = [0] * crew.size
    for record in sorted(manifest.files, key=lambda record: -record.num_bytes):
        reader = loads.index(min(loads))
        loads[reader] += record.num_bytes
        if reader == crew.rank:
            check_bytes(folder, record, filesystem)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A checkpoint matched with what it is to be loaded into."""

    folder: Path
    filesystem: FileSystem
    manifest: Manifest
    index: Index
    saved: Mapping[str, Saved]
    targets: Mapping[str, Mapping[str, torch.Tensor]]
    states: Mapping[str, Any]
    divided: frozenset[str]
    """Those of `states` that were divided over the ranks, and are whole here."""
    untouched: tuple[tuple[str, str], ...]
    later: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        folder: Path,
        contents: Contents[Sharded, Stateful],
        crew: Crew,
        filesystem: FileSystem,
        allow_pickle: bool,
        strict: bool,
    ) -> _Reading:
        manifest = read_manifest(folder, filesystem)
        index = Index.from_json(_read(folder, INDEX, filesystem))
        shared = _read_states(folder, "shared", filesystem, allow_pickle)
        own: dict[str, Any] = {}
        reason = ""
        if manifest.world_size == crew.size:
            own = _read_states(folder, f"rank-{crew.rank:05d}", filesystem, allow_pickle)
        else:
            reason = (
                f"it was saved by {manifest.world_size} ranks, each with its own, and {crew.size} load it"
            )
        saved = {
            name.removeprefix(PLAIN): _saved(name.removeprefix(PLAIN), shared.pop(name), index)
            for name in list(shared)
            if name.startswith(PLAIN)
        }
        untouched = [(name, reason) for name in contents.per_rank if reason]
        wanted_own = [] if reason else list(contents.per_rank)
        sharded = {name: thing for name, thing in contents.sharded.items() if name in saved}
        # First: that it is another model says more than that other things came with it.
        targets = {name: _targets(name, thing, saved[name]) for name, thing in sharded.items()}
        wanted = [*contents.sharded, *contents.shared, *wanted_own]
        states = {**shared, **own}
        later = {
            name: state
            for name, state in states.items()
            if name not in wanted and name.startswith(contents.later)
        }
        held = [*saved, *(name for name in states if name not in later)]
        found = differences(wanted, held)
        if found and strict:
            more = "holds more" if set(wanted) <= set(held) else "holds other things"
            raise CheckpointError(
                f"checkpoint {folder} {more} than was prepared: {found}. Prepare or register the same. To load "
                "what both have, leave resume= out and call accelerator.load_state(folder, strict=False); names and "
                "shapes are compared all the same."
            )
        untouched += [(name, "the checkpoint has none") for name in wanted if name not in held]
        return cls(
            folder=folder,
            filesystem=filesystem,
            manifest=manifest,
            index=index,
            saved=saved,
            targets=targets,
            states=states,
            divided=divided_of(_read(folder, "shared.json", filesystem)),
            untouched=tuple(untouched),
            later=later,
        )

    def fill(self) -> None:
        """Reads the tensors of models and optimizers."""
        flat = {f"{item}/{name}": t for item, targets in self.targets.items() for name, t in targets.items()}
        read_into(flat, self.index, self.folder, self.filesystem)

    def hand_over(self, contents: Contents[Sharded, Stateful]) -> None:
        """Gives everything to its owner."""
        for name, targets in self.targets.items():
            contents.sharded[name].finish(targets, self.saved[name])
        for name, thing in {**contents.shared, **contents.per_rank}.items():
            if name in self.states:
                state = self.states[name]
                thing.load_state_dict(
                    lay_out_as(thing.state_dict(), state) if name in self.divided else state
                )


def _targets(name: str, thing: Any, saved: Saved) -> dict[str, torch.Tensor]:
    try:
        targets: dict[str, torch.Tensor] = thing.targets(saved)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return targets


def _saved(item: str, plain: Mapping[str, Any], index: Index) -> Saved:
    prefix = f"{item}/"
    names = [name for name in index.names if name.startswith(prefix)]
    return Saved(
        shapes={name[len(prefix) :]: index.tensor(name).size for name in names},
        dtypes={name[len(prefix) :]: index.tensor(name).properties.dtype for name in names},
        plain=plain,
    )


def _read(folder: Path, name: str, filesystem: FileSystem) -> bytes:
    with filesystem.open(folder / name) as handle:
        return handle.read()


def _read_states(folder: Path, name: str, filesystem: FileSystem, allow_pickle: bool) -> dict[str, Any]:
    document = _read(folder, f"{name}.json", filesystem)
    tensors: dict[str, torch.Tensor] = {}
    file = f"{name}.safetensors"
    if file in filesystem.names(folder):
        with filesystem.open(folder / file) as handle:
            tensors = {key: read_tensor(handle, entry) for key, entry in read_header(handle).items()}
    return unpack(
        document, tensors, lambda pickled: _read(folder, pickled, filesystem), allow_pickle=allow_pickle
    )
