"""DeepSpeed's own checkpoints turned into ours, which any number of ranks and any strategy can load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from nbaccel.core.checkpoint import Checkpoints, Contents, Entries, LocalFileSystem
from nbaccel.core.checkpoint.find import examine
from nbaccel.core.world import single
from nbaccel.core.zero.native import Native, find_native, read_native

__all__ = ["convert"]


def convert(folder: Path) -> Path | None:
    """Makes the checkpoint `<name>-universal` beside what DeepSpeed wrote in `folder`, unless it is there already.

    It holds the model, the optimizer, the step and the schedule. Called by one rank, which has the parameters and
    moments in its memory meanwhile.

    Returns:
        The checkpoint; None where `folder` is none of DeepSpeed's.

    Raises:
        CheckpointError: it cannot be read, or the other cannot be written.
    """
    found = find_native(folder)
    if found is None:
        return None
    target = found.with_name(f"{found.name}-universal")
    origin = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(found.glob("*.pt"))
    }
    known = examine(target, LocalFileSystem())
    if known.manifest is not None and not known.problem and known.manifest.extra.get("converted") == origin:
        return target
    native = read_native(found)
    print(
        f"{found} is DeepSpeed's own checkpoint, of {native.world_size} ranks: converting it to {target}, which any "
        "number of ranks can load",
        flush=True,
    )
    checkpoints = Checkpoints(world=single())
    checkpoints.save(target, _contents(native, origin), step=native.step)
    checkpoints.close()
    return target


def _contents(native: Native, origin: Mapping[str, Any]) -> Contents[_Converted, _State]:
    shared = {"counters": _State({"steps": native.step, "knobs": {}})}
    if native.scheduler is not None and _plain(native.scheduler):
        shared["scheduler_0"] = _State(native.scheduler)
    names = list(native.moments)
    optimizer = Entries(
        tensors={
            f"state.{name}.{key}": native.moments[name][key] for name in names for key in native.moments[name]
        },
        plain={
            "groups": native.groups,
            "keys": {name: list(native.moments[name]) for name in names},
            "rest": {},
            "other": {},
        },
    )
    return Contents(
        sharded={"model_0": _Converted(Entries(tensors=native.model)), "optimizer_0": _Converted(optimizer)},
        shared=shared,
        extra={"converted": origin},
    )


def _plain(value: Any) -> bool:
    """Whether it is what a checkpoint keeps without pickles."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@final
class _Converted:
    """A model or an optimizer that has been read, whole, to be written."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def entries(self) -> Entries:
        return self._entries


@final
class _State:
    """A state that has been read, to be written."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> Mapping[str, Any]:
        return self._state
