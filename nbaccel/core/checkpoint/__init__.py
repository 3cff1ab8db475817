"""Checkpoints that are either complete and verified, or not there.

`Checkpoints` saves and loads `Contents`; `find` says which checkpoints a folder holds. One folder is

    manifest.json              written last; sizes and checksums of all others, step, world size, versions
    index.json                 which piece of which tensor is in which rank's file
    shards-00000.safetensors   the pieces of models and optimizers that rank 0 wrote, and so on
    shared.json, .safetensors  states equal on all ranks, and the plain values of models and optimizers
    rank-00000.json, …         the states rank 0 alone has
"""

from __future__ import annotations

from nbaccel.core.checkpoint.contents import Contents, Entries, Saved, Sharded, Stateful
from nbaccel.core.checkpoint.filesystem import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.find import Found, next_folder
from nbaccel.core.checkpoint.modules import ModelState, OptimizerState
from nbaccel.core.checkpoint.reader import Loaded
from nbaccel.core.checkpoint.saver import Checkpoints, SaveReport

__all__ = [
    "Checkpoints",
    "Contents",
    "Entries",
    "FileSystem",
    "Found",
    "Loaded",
    "LocalFileSystem",
    "ModelState",
    "OptimizerState",
    "SaveReport",
    "Saved",
    "Sharded",
    "Stateful",
    "next_folder",
]
