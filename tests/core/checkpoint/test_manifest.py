from __future__ import annotations

from pathlib import Path

import pytest

from nbaccel.core.checkpoint.files import write_file
from nbaccel.core.checkpoint.filesystem import LocalFileSystem
from nbaccel.core.checkpoint.manifest import FileRecord, Manifest, check_bytes, check_sizes, describe
from nbaccel.errors import CheckpointError

MANIFEST = Manifest(
    step=7,
    world_size=2,
    saved_at=1.25,
    versions={"torch": "2"},
    files=(FileRecord(name="a.json", parts=((3, 17), (2, 99))),),
    extra={"epoch": 1},
)


def test_manifest_comes_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_every_truncation_of_a_manifest_is_noticed() -> None:
    data = MANIFEST.to_json()
    for length in range(len(data) - 2):  # the last byte is a line end
        with pytest.raises((ValueError, KeyError)):
            Manifest.from_json(data[:length])


def test_every_flipped_byte_of_a_manifest_changes_nothing_or_is_noticed() -> None:
    data = MANIFEST.to_json()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        try:
            found = Manifest.from_json(bytes(damaged))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        assert found == MANIFEST, position


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**24 + 5])
def test_file_is_described_as_it_was_written(tmp_path: Path, size: int) -> None:
    filesystem = LocalFileSystem()
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    record = write_file(tmp_path, "f", [data[:10], data[10:]], filesystem)
    assert (tmp_path / "f").read_bytes() == data
    assert record.num_bytes == size
    check_bytes(tmp_path, record, filesystem)
    check_bytes(tmp_path, describe(tmp_path / "f", "f", filesystem), filesystem)


def test_flipped_byte_is_found_with_the_file_named(tmp_path: Path) -> None:
    filesystem = LocalFileSystem()
    record = write_file(tmp_path, "f", [b"a" * 2**24, b"b" * 100], filesystem)
    with open(tmp_path / "f", "r+b") as handle:
        handle.seek(2**24 + 50)
        handle.write(b"c")
    with pytest.raises(CheckpointError, match="f is damaged"):
        check_bytes(tmp_path, record, filesystem)


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    filesystem = LocalFileSystem()
    with pytest.raises(CheckpointError, match=r"a\.json is missing"):
        check_sizes(tmp_path, MANIFEST, filesystem)
    (tmp_path / "a.json").write_bytes(b"abcd")
    with pytest.raises(CheckpointError, match=r"a\.json has 4 bytes instead of 5"):
        check_sizes(tmp_path, MANIFEST, filesystem)
