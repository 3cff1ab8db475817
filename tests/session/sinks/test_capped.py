"""Logs that keep their beginning and their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbaccel.session.sinks.capped import CappedLog, read_log


@pytest.mark.parametrize("size", [0, 1, 50, 99, 100, 101, 149, 150, 151, 250, 1000, 1023])
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_log_keeps_both_halves_and_says_what_is_missing(tmp_path: Path, size: int, chunk: int) -> None:
    data = bytes(33 + i % 90 for i in range(size))
    path = tmp_path / "rank-0.log"
    log = CappedLog(path, 100)
    for start in range(0, size, chunk):
        log.write(data[start : start + chunk])
        log.flush()
    assert log.buffered == 0
    log.close()
    log.close()
    gap = f"\n… {size - 100} bytes left out here …\n".encode()
    expected = data if size <= 100 else data[:50] + gap + data[-50:]
    assert not size or read_log(path) == expected
    assert log.dropped == max(0, size - 100)
    assert [p.name for p in tmp_path.iterdir()] == (["rank-0.log"] if size else [])


def test_newest_bytes_can_be_read_while_the_log_is_open(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"
    with pytest.raises(FileNotFoundError):
        read_log(path)
    log = CappedLog(path, 100)
    for i in range(40):
        log.write(b"line %4d\n" % i)
        log.flush()
    live = read_log(path)
    log.close()
    assert live.startswith(b"line    0\n")
    assert live.endswith(b"line   38\nline   39\n")
    assert len(live) <= 150
