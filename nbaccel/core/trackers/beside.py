"""What is kept as files beside a tracker's own: pictures as PNG, tables as CSV, copies of files."""

from __future__ import annotations

import csv
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["copy", "file_name", "files_of", "png", "write_copy", "write_images", "write_table"]


_KEPT = ("files", "artifacts")
"""Folders of a project's folder that hold what was logged as files: JSONL's and CSV's, and MLflow's."""


def file_name(name: str, step: int | None, ending: str) -> str:
    """A file name for what was logged as `name` at `step`; "eval/samples" becomes "eval-samples"."""
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "unnamed"
    return f"{slug}{'' if step is None else f'-{step}'}{ending}"


def write_images(folder: Path, values: Mapping[str, Sequence[Any]], step: int | None) -> list[Path]:
    """Writes arrays (height, width, channels) of uint8 to `<folder>/images`."""
    target = folder / "images"
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, pictures in values.items():
        for at, pixels in enumerate(pictures):
            number = f"-{at}" if len(pictures) > 1 else ""
            path = target / file_name(name, step, f"{number}.png")
            path.write_bytes(png(pixels))
            written.append(path)
    return written


def write_table(
    folder: Path, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int | None
) -> Path:
    """Writes a table to `<folder>/tables`."""
    target = folder / "tables"
    target.mkdir(parents=True, exist_ok=True)
    path = target / file_name(name, step, ".csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(data)
    return path


def write_copy(folder: Path, source: Path, name: str) -> Path:
    """Copies a file or a folder to `<folder>/files`, over what was there under that name."""
    target = folder / "files" / name
    copy(source, target, home=folder)
    return target


def copy(source: Path, target: Path, *, home: Path | None) -> None:
    """Copies a file or a folder, over what is there; nothing where it is there already.

    Args:
        home: the project's folder. A folder around it is copied without what was logged as files before, which would
            else be copied into itself, more at each time.
    """
    if source.resolve() == target.resolve():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    but = {target.resolve(), *(() if home is None else ((home / name).resolve() for name in _KEPT))}

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder, name).resolve() in but}

    shutil.copytree(source, target, ignore=left_out, copy_function=_copy_if_there, dirs_exist_ok=True)


def _copy_if_there(source: str, target: str) -> None:
    """A database beside has files that are gone a moment later."""
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        if os.path.lexists(source):
            raise


def files_of(path: Path) -> Iterator[tuple[str, Path]]:
    """A folder's files, each with its path within it; of a file itself only, with none."""
    if not path.is_dir():
        yield "", path
    else:
        yield from ((str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file())


def png(pixels: Any) -> bytes:
    """An array (height, width, channels) of uint8 as a PNG file (RFC 2083); 1, 3 or 4 channels."""
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
