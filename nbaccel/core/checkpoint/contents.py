"""What goes into a checkpoint, and how each kind of thing comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

__all__ = ["PLAIN", "Contents", "Entries", "HasEntries", "HasState", "Saved", "Sharded", "Stateful"]

PLAIN = "plain of "
"""Begins the name under which the plain values of a sharded thing stand among the shared states."""


class HasState(Protocol):
    """Anything that can say what it is: enough to be saved."""

    def state_dict(self) -> Any: ...


@runtime_checkable
class Stateful(HasState, Protocol):
    """Anything that can say what it is and become it again."""

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The state of something spread over the ranks: flat, by canonical name."""

    tensors: Mapping[str, torch.Tensor]
    """Plain tensors are the same on all ranks and written by one of them; each rank writes its part of a
    DTensor."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """What is not a tensor, the same on all ranks; rank 0's is written."""
    of_rank_zero: Collection[str] = ()
    """Plain tensors whose value is rank 0's: buffers, which ranks may hold in different versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a checkpoint holds of one such thing: global shape and dtype by name, and the plain values."""

    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    plain: Mapping[str, Any]


class HasEntries(Protocol):
    """A model or an optimizer, as it is saved."""

    def entries(self) -> Entries:
        """What to save."""


class Sharded(HasEntries, Protocol):
    """A model or an optimizer, whose tensors can be saved on some ranks and read on others."""

    def targets(self, saved: Saved) -> dict[str, torch.Tensor]:
        """Where to read each tensor to, all of `saved.shapes`' that are wanted.

        Raises:
            CheckpointError: what was saved is of another model; the differing names are in the message.
        """

    def finish(self, tensors: Mapping[str, torch.Tensor], saved: Saved) -> None:
        """Takes over what was read into `targets`, and the plain values."""


ThingT = TypeVar("ThingT", bound=HasEntries, covariant=True)
StateT = TypeVar("StateT", bound=HasState, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents(Generic[ThingT, StateT]):
    """Everything of one checkpoint, by name. The mappings are read after the pre-hooks have run.

    Any can be saved; loaded are those of `Sharded` things and `Stateful` states.
    """

    sharded: Mapping[str, ThingT] = field(default_factory=dict)
    """Models and optimizers: they can be loaded on more or fewer ranks."""
    shared: Mapping[str, StateT] = field(default_factory=dict)
    """Things with the same state on every rank; rank 0's is written, every rank gets it."""
    per_rank: Mapping[str, StateT] = field(default_factory=dict)
    """Things with a state of their own on each rank, such as random generators. Each rank gets its own
    back when as many ranks load as saved; else it is left alone and the load says so."""
    before: tuple[Callable[[Path], None], ...] = ()
    """Called on every rank before anything else, with the folder (when saving: the one being filled;
    files written there become part of the checkpoint)."""
    later: tuple[str, ...] = ()
    """How names of states begin that may have no owner here yet: a load hands such states out (`Loaded.later`)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for the manifest."""
