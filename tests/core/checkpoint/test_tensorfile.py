from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nbaccel.core.checkpoint.files import layout_of, write_tensors
from nbaccel.core.checkpoint.filesystem import LocalFileSystem
from nbaccel.core.checkpoint.tensorfile import read_header, read_tensor

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
]  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_tensors(folder, "t.safetensors", layout_of(tensors), tensors.__getitem__, LocalFileSystem())
    return folder / "t.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensor_of_any_dtype_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2, (count,), dtype=torch.uint8).view(dtype).view(shape)
    path = write(tmp_path, {"odd": torch.ones(3, dtype=torch.uint8), "x": data})
    with open(path, "rb") as handle:
        found = read_tensor(handle, read_header(handle)["x"])  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), data.reshape(-1).view(torch.uint8))


def test_file_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones((), dtype=torch.bfloat16)}
    with safe_open(write(tmp_path, tensors), "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_strided_tensor_is_written_as_it_looks(tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).t()
    with safe_open(write(tmp_path, {"a": tensor}), "pt") as file:
        assert torch.equal(file.get_tensor("a"), tensor)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff" * 100)
    with open(tmp_path / "x", "rb") as handle, pytest.raises(ValueError, match="not a safetensors file"):
        read_header(handle)  # type: ignore[arg-type]
