"""How much memory a model takes: to train, by strategy and rank, and to serve. No weights are loaded.

Counted are the states that last from step to step. Activations come on top: they depend on the batch.
The shares of the sharded strategies are those of the ZeRO paper (Rajbhandari et al. 2020, section 5).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nbaccel.core.checkpoint.tensorfile import Entry, read_header
from nbaccel.errors import ConfigError

__all__ = ["OPTIMIZERS", "Size", "Training", "measure", "serving_bytes", "training_memory"]

Optimizer = Literal["adamw", "momentum", "sgd"]
OPTIMIZERS: dict[str, int] = {"adamw": 8, "momentum": 4, "sgd": 0}
"""Bytes of state per parameter: what torch.optim keeps in float32."""
_SERVED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a model is made of."""

    name: str
    source: str
    """Where it was read: "safetensors", "config" or "python"."""
    parameters: int
    """Elements, tied ones counted once."""
    trainable: int
    buffer_bytes: int
    largest_layer: int
    """Elements of the largest parameter or, where the structure is known, of the largest repeated block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Bytes of one rank, by what they are for."""

    strategy: str
    built: bool
    """Whether this version can run it."""
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Without activations."""
        return self.weights + self.gradients + self.optimizer


def training_memory(
    size: Size, *, num_processes: int, optimizer: str = "adamw", mixed_precision: str = "no"
) -> list[Training]:
    """What training takes on one of `num_processes` ranks, for each strategy.

    Weights, gradients and optimizer state are float32; under autocast a copy of the weights in the narrow
    type lives through the forward pass and is counted with the weights.
    """
    narrow = 2 if mixed_precision in ("bf16", "fp16") else 0
    weights = 4 * size.parameters + size.buffer_bytes
    copy = narrow * size.parameters
    gradients, state = 4 * size.trainable, OPTIMIZERS[optimizer] * size.trainable
    share = num_processes
    gathered = (narrow or 4) * size.largest_layer

    def row(strategy: str, built: bool, w: float, g: float, o: float) -> Training:
        return Training(strategy=strategy, built=built, weights=int(w), gradients=int(g), optimizer=int(o))

    rows = [row("single" if share == 1 else "ddp", True, weights + copy, gradients, state)]
    if share > 1:
        rows += [
            row("zero-1", False, weights + copy, gradients, state / share),
            row("zero-2", False, weights + copy, gradients / share, state / share),
            row("fsdp, zero-3", False, weights / share + gathered, gradients / share, state / share),
        ]
    return rows


def serving_bytes(size: Size) -> dict[str, int]:
    """Bytes of the weights by the type they are served in; caches and activations come on top."""
    return {name: int(size.parameters * each) + size.buffer_bytes for name, each in _SERVED.items()}


def measure(text: str) -> Size:
    """The size of what `text` names: a safetensors file, a folder with such files or with a Hugging Face
    config.json, such a config.json, or `package.module:name` of a module, its class or a function.

    Raises:
        ConfigError: it is none of these, or cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return _from_headers(text, [path])
    if path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
        if weights:
            return _from_headers(text, weights)
        if (path / "config.json").is_file():
            return _from_config(text, path / "config.json")
        raise ConfigError(f"{text} holds neither *.safetensors nor config.json")
    if path.is_file():
        return _from_config(text, path)
    if ":" in text:
        return _from_python(text)
    raise ConfigError(
        f"{text!r} is no file or folder here, nor package.module:name. Models are read locally: download it first."
    )


def _from_headers(name: str, paths: list[Path]) -> Size:
    entries: dict[str, Entry] = {}
    for path in paths:
        try:
            with path.open("rb") as handle:
                entries |= read_header(handle)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is not a safetensors file that can be read: {error}") from error
    shapes = {key: torch.Size(entry.shape) for key, entry in entries.items() if entry.dtype.is_floating_point}
    counts = {key: shape.numel() for key, shape in shapes.items()}
    others = sum(entry.num_bytes for entry in entries.values() if not entry.dtype.is_floating_point)
    total = sum(counts.values())
    return Size(
        name=name,
        source="safetensors",
        parameters=total,
        trainable=total,
        buffer_bytes=others,
        largest_layer=max(_blocks(counts).values(), default=0),
    )


def _from_config(name: str, path: Path) -> Size:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{path} is no Hugging Face configuration with `architectures`: {error!r}"
        ) from error
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"a config.json is read with transformers: pip install transformers ({error})"
        ) from error
    model_class = getattr(transformers, str(kind), None)
    if model_class is None:
        raise ConfigError(f"{path} names {kind}, which this transformers does not have")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever a configuration can be wrong in
        raise ConfigError(f"{kind} cannot be built from {path}: {type(error).__name__}: {error}") from error
    return _from_module(name, "config", model)


def _from_python(text: str) -> Size:
    module, _, attribute = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, nn.Module):
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how it will run, which it will not
                found = found()
    except Exception as error:  # the user's own code
        raise ConfigError(f"{text} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, nn.Module):
        raise ConfigError(f"{text} gives a {type(found).__name__}, not a torch.nn.Module")
    return _from_module(text, "python", found)


def _from_module(name: str, source: str, model: nn.Module) -> Size:
    counts = {key: parameter.numel() for key, parameter in model.named_parameters()}
    return Size(
        name=name,
        source=source,
        parameters=sum(counts.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        largest_layer=max(_blocks(counts).values(), default=0),
    )


def _blocks(counts: dict[str, int]) -> dict[str, int]:
    """Elements by block: what stands under one number (`layers.3`), else the parameter's own module."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = ".".join(parts[: numbered + 1] if numbered is not None else parts[:-1])
        found[block] = found.get(block, 0) + count
    return found
