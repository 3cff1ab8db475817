from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from nbaccel import init_empty_weights, load_checkpoint_and_dispatch
from nbaccel.core.offload.sources import open_checkpoint
from nbaccel.core.offload.weights import TensorFile, are_resident, make_resident, sample_pages
from nbaccel.errors import CheckpointError
from tests.core.offload.models import Inputs, made


def check(path: Path, *, written: bool = False, **options: object) -> None:
    """Loads the MLP from `path`, on the CPU, on the disk, and converted, and compares its answers."""
    _, inputs, wanted = made("mlp")
    for place in ("cpu", "disk"):
        for dtype in (None, torch.float64):
            with init_empty_weights():
                empty = made_empty()
            loaded = load_checkpoint_and_dispatch(empty, path, {"": place}, dtype=dtype, **options)  # type: ignore[arg-type]
            given: Inputs = {"input": inputs["input"].to(dtype or torch.float32)}
            with torch.no_grad():
                assert torch.allclose(loaded(**given).float(), wanted, atol=1e-6)
                if dtype is None:
                    assert torch.equal(loaded(**given), wanted)


def made_empty() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def state() -> dict[str, torch.Tensor]:
    return made("mlp")[0].state_dict()


def test_one_safetensors_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.safetensors")
    check(tmp_path / "weights.safetensors")
    check(tmp_path)


def shards(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, (name, tensor) in enumerate(state().items()):
        save_file({name: tensor}, folder / f"part-{number}.safetensors")
        weight_map[name] = f"part-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_with_an_index(tmp_path: Path) -> None:
    shards(tmp_path)
    check(tmp_path)
    check(tmp_path / "model.safetensors.index.json")


def test_folders_inside_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    tensors = list(state().items())
    save_file(dict(tensors[:2]), tmp_path / "a" / "b" / "x.safetensors")
    (tmp_path / "c").mkdir()
    save_file(dict(tensors[2:]), tmp_path / "c" / "y.safetensors")
    check(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_torch_files(suffix: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / f"model.{suffix}")
    (tmp_path / "optimizer.pt").write_bytes(b"not of the model")
    check(tmp_path)


def test_torch_file_of_a_training_script(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": state()}, tmp_path / "last.pt")
    check(tmp_path / "last.pt")


def test_torch_file_of_before_zip_is_written_to_the_offload_folder(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    check(tmp_path / "old.bin", offload_folder=tmp_path / "offload")
    assert [p.suffix for p in (tmp_path / "offload").iterdir()] == [".safetensors"] * 2, "float32 and float64"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    dcp.save({"model": state(), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    check(tmp_path / "dcp")
    check(tmp_path / "dcp", offload_folder=tmp_path / "offload")


def test_pickles_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"0.weight": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="weights alone"):
        open_checkpoint(tmp_path / "model.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"would import posix\.system"):
        open_checkpoint(tmp_path / "dcp")
    # a name with a dot reaches what a module has imported
    dotted = b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.system\x93."
    (tmp_path / "dcp" / ".metadata").write_bytes(dotted)
    with pytest.raises(CheckpointError, match=r"would import .*os\.system"):
        open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


def test_truncated_file_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*truncated: 100 bytes are missing"):
        open_checkpoint(path)
    path.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match="too early"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="too early"):
        open_checkpoint(path)


def test_torch_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "epoch": 1}, tmp_path / "last.ckpt")
    check(tmp_path / "last.ckpt")


@pytest.mark.parametrize("suffix", ["bin", "safetensors", "ckpt"])
def test_pointer_of_git_lfs_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 1234\n")
    with pytest.raises(CheckpointError, match=rf"model\.{suffix} is only git-lfs's pointer.*git lfs pull"):
        open_checkpoint(path)


def test_truncated_torch_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(state(), path)
    whole = path.read_bytes()
    for size in (len(whole) - 1000, 100, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.bin .*it is truncated, download or copy it again"):
            open_checkpoint(path)
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:30], b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.bin .*it is damaged, or no torch file \(.+\)"):
            open_checkpoint(path)


def test_torch_file_with_more_than_weights_says_what_it_holds(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"
    ) as raised:
        open_checkpoint(tmp_path / "model.pt")
    assert "weights_only" not in str(raised.value)


def test_sizes_that_contradict_the_shape_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="w has 8 bytes and its shape"):
        TensorFile(tmp_path / "w.safetensors")


def test_incomplete_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(tmp_path)
    shards(tmp_path)
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: part-2\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(state(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several files"):
        open_checkpoint(tmp_path)


def test_views_do_not_copy_and_reads_do(tmp_path: Path) -> None:
    save_file({"w": torch.arange(100_000.0)}, tmp_path / "w.safetensors")
    stored = open_checkpoint(tmp_path)["w"]
    first, second, read = stored.view(), stored.view(), stored.read()
    assert first is not None
    assert second is not None
    assert first.data_ptr() == second.data_ptr() != read.data_ptr()
    assert torch.equal(first, read)


def test_odd_alignment_is_read_instead_of_mapped(tmp_path: Path) -> None:
    odd = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    first = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"w": odd, "b": first}).encode()
    header += b" " * (-len(header) % 8)
    body = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    stored = open_checkpoint(tmp_path)["w"]
    assert stored.view() is None
    assert stored.read().tolist() == [1.5, -2.0]


def test_pages_become_resident(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1 << 20)}, path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tensor = open_checkpoint(path)["w"].view()
    assert tensor is not None
    make_resident(tensor)
    assert are_resident(sample_pages(tensor))
