"""Sharded checkpoints; what else accelerate has for them is refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.merge import merge
from nbaccel.errors import ConfigError

__all__ = ["merge_fsdp_weights"]


def merge_fsdp_weights(
    checkpoint_dir: str | Path,
    output_path: str | Path,
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """Writes the whole weights of a checkpoint of `save_state` as safetensors; so does `nbaccel merge`.

    Raises:
        CheckpointError: it is not complete, or damaged.
        ConfigError: another format, or the checkpoint is to be deleted.
    """
    if not safe_serialization or remove_checkpoint_dir:
        raise ConfigError(
            "merge_fsdp_weights writes safetensors and keeps the checkpoint, from which a run can go on: leave out "
            "safe_serialization=False and remove_checkpoint_dir=True"
        )
    merge(Path(checkpoint_dir), Path(output_path))


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
