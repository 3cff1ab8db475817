"""How large a model is: what its parameters, buffers and repeated blocks take. No weights are loaded."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nbaccel.core.checkpoint.tensorfile import Entry, read_header
from nbaccel.errors import ConfigError

__all__ = ["Size", "measure", "serving_bytes", "size_of", "together"]

_SERVED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a model is made of. Numbers are elements where they are not bytes."""

    name: str
    source: str
    """Where it was read: "safetensors", "config" or "python"."""
    parameters: int
    """Tied ones counted once."""
    trainable: int
    element_bytes: float = 4.0
    """Bytes of a parameter while it trains."""
    buffer_bytes: int
    largest_parameter: int
    largest_block: int
    """The largest of the repeated blocks (`layers.3`); of a model without any, its largest layer."""
    num_blocks: int
    outside: int
    """Parameters in no repeated block: embeddings, the head. 0 in a model without blocks."""


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
        **_structure(counts),
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
    return size_of(model, name=name, source="config")


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
    return size_of(found, name=text)


def size_of(model: nn.Module, *, name: str = "", source: str = "python") -> Size:
    """The size of a module, which may be on the meta device.

    Raises:
        ConfigError: a lazy module has not been called.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in (*parameters.items(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{key} of {type(model).__name__} has no shape before the first forward: call the model once before"
            )
    # a parameter that was made under DeepSpeed's zero.Init is empty, and says what it is the shard of
    counts = {key: int(getattr(p, "ds_numel", p.numel())) for key, p in parameters.items()}
    total = sum(counts.values())
    return Size(
        name=name or type(model).__name__,
        source=source,
        parameters=total,
        trainable=sum(counts[key] for key, p in parameters.items() if p.requires_grad),
        element_bytes=sum(n * parameters[key].itemsize for key, n in counts.items()) / total
        if total
        else 4.0,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        **_structure(counts),
    )


def together(sizes: Sequence[Size]) -> Size:
    """The size of several models that are trained side by side."""
    if len(sizes) == 1:
        return sizes[0]
    total = sum(one.parameters for one in sizes)
    held = sum(one.parameters * one.element_bytes for one in sizes)
    return Size(
        name=" and ".join(one.name for one in sizes),
        source=sizes[0].source,
        parameters=total,
        trainable=sum(one.trainable for one in sizes),
        element_bytes=held / total if total else 4.0,
        buffer_bytes=sum(one.buffer_bytes for one in sizes),
        largest_parameter=max(one.largest_parameter for one in sizes),
        largest_block=max(one.largest_block for one in sizes),
        num_blocks=sum(one.num_blocks for one in sizes),
        outside=sum(one.outside for one in sizes),
    )


def _structure(counts: Mapping[str, int]) -> dict[str, int]:
    """The blocks among parameters of these names and elements: what stands under one number is one."""
    numbered: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, count in counts.items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        found, block = (layers, parts[:-1]) if place is None else (numbered, parts[: place + 1])
        found[".".join(block)] = found.get(".".join(block), 0) + count
    blocks = numbered or layers
    return {
        "largest_parameter": max(counts.values(), default=0),
        "largest_block": max(blocks.values(), default=0),
        "num_blocks": len(blocks),
        "outside": sum(layers.values()) if numbered else 0,
    }
