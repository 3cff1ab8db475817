"""Reading past the page cache through DeepSpeed's asynchronous I/O: the bytes of real files, wherever they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbaccel.core.async_io import async_io, is_compiled, obstacle
from nbaccel.core.offload.direct import DirectReader, direct_reader
from nbaccel.core.offload.sources import open_checkpoint
from nbaccel.errors import CheckpointError

MB = 1 << 20


@pytest.fixture(scope="module")
def reader() -> DirectReader:
    if missing := obstacle():
        pytest.skip(missing)
    return DirectReader(async_io())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors at odd offsets, of several types, shorter and longer than a chunk; the last ends with the file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randint(256, (3,), dtype=torch.uint8, generator=generator),
        "b": torch.randn(2 * MB + 1, generator=generator),
        "c": torch.randn(600, 1024, generator=generator).to(torch.bfloat16),
        "d": torch.randint(256, (33 * MB + 5,), dtype=torch.uint8, generator=generator),
        "e": torch.randn(300, 1000, generator=generator),
    }
    path = tmp_path_factory.mktemp("direct") / "weights.safetensors"
    save_file(tensors, path)
    return path, tensors


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bytes_when_read_past_the_cache_are_those_of_the_file(
    reader: DirectReader, written: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = written
    drop_from_cache(path)
    stored = open_checkpoint(path)
    for name in ("b", "c", "d", "e"):
        target = torch.empty_like(tensors[name])
        assert reader.fill(stored[name], target), name
        assert torch.equal(target, tensors[name]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tensor_when_another_way_is_as_good_is_left_to_it(
    reader: DirectReader, written: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = written
    stored = open_checkpoint(path)
    assert not reader.fill(stored["a"], torch.empty_like(tensors["a"]))  # small
    assert not reader.fill(stored["b"], torch.empty(2 * MB + 1, dtype=torch.float64))  # converted
    path.read_bytes()
    assert not reader.fill(stored["b"], torch.empty_like(tensors["b"]))  # in the page cache


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_file_when_it_was_replaced_or_cut_short(reader: DirectReader, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    first = torch.randn(MB)
    save_file({"w": first}, path)
    stored = open_checkpoint(path)["w"]
    other = tmp_path / "other"
    save_file({"w": torch.zeros(MB)}, other)
    drop_from_cache(path)
    other.rename(path)
    target = torch.empty(MB)
    assert reader.fill(stored, target)
    assert torch.equal(target, first)
    shorter = open_checkpoint(path)["w"]
    os.truncate(path, 2 * MB)
    drop_from_cache(path)
    with pytest.raises(CheckpointError, match="truncated"):
        reader.fill(shorter, target)


def test_reader_when_it_cannot_help_is_not_made() -> None:
    assert direct_reader(torch.device("cpu"), 100, 10) is None
    assert direct_reader(torch.device("cuda"), 10, 100) is None
    if not is_compiled() or obstacle() is not None:
        assert direct_reader(torch.device("cuda"), 100, 10) is None
