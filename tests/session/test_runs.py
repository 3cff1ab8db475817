"""Run folders: where, which, and which may go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbaccel.session.runs import LOCK, default_root, new_folder, prune, recent


def ended(root: Path, name: str, stamp: str, *, size: int = 10, state: str = "done") -> Path:
    """A folder of a run that has ended."""
    folder = root / f"{stamp}-{name}-0a1b2c"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": name}))
    (folder / "result.json").write_text(json.dumps({"state": state, "started": 5.0, "duration": 2.5}))
    (folder / "rank-0.log").write_bytes(b"x" * size)
    return folder


def test_default_root_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    state = tmp_path / "state"
    assert default_root({"XDG_STATE_HOME": str(state)}, "linux") == state / "nbaccel" / "runs"
    local = tmp_path / ".local" / "state" / "nbaccel" / "runs"
    assert default_root({}, "linux") == local
    assert default_root({"XDG_STATE_HOME": "relative"}, "linux") == local
    mac = tmp_path / "Library" / "Application Support" / "nbaccel" / "runs"
    assert default_root({}, "darwin") == mac
    assert default_root({"LOCALAPPDATA": str(state)}, "win32") == state / "nbaccel" / "runs"
    assert default_root({}, "win32") == tmp_path / "AppData" / "Local" / "nbaccel" / "runs"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("train", "train"),
        ("<lambda>", "lambda"),
        ("../../etc", "etc"),
        ("", "run"),
        ("été x", "t-x"),
        ("n" * 99, "n" * 40),
    ],
)
def test_new_folder_has_a_safe_name_below_the_root(tmp_path: Path, name: str, slug: str) -> None:
    folder = new_folder(tmp_path / "a" / "b", name)
    assert folder.parent == tmp_path / "a" / "b"
    assert folder.name[16:-7] == slug
    assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert folder.stat().st_mode & 0o077 == 0


def test_folders_of_concurrent_processes_are_all_different(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from nbaccel.session.runs import *\n"
        "for _ in range(50): new_folder(pathlib.Path(sys.argv[1]), 'same'); prune(pathlib.Path(sys.argv[1]), keep=100)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    folders = list(tmp_path.iterdir())
    assert all(folder.name[16:-7] == "same" for folder in folders)
    assert 100 <= len(folders) <= 150


def test_recent_lists_the_newest_first_with_their_ends(tmp_path: Path) -> None:
    ended(tmp_path, "old", "20240101-000000", state="failed")
    ended(tmp_path, "newer", "20240102-000000")
    killed = ended(tmp_path, "killed", "20240103-000000")
    (killed / "result.json").unlink()
    running = new_folder(tmp_path, "now")
    (tmp_path / "unrelated").mkdir()
    assert [(run.name, run.state, run.duration) for run in recent(tmp_path)] == [
        ("now", "running", None),
        ("killed", "lost", None),
        ("newer", "done", 2.5),
        ("old", "failed", 2.5),
    ]
    assert recent(tmp_path)[0].folder == running
    assert abs(recent(tmp_path)[0].started - time.time()) < 60
    assert len(recent(tmp_path, limit=2)) == 2
    assert recent(tmp_path / "missing") == []


def test_prune_keeps_the_newest_in_number_and_size(tmp_path: Path) -> None:
    folders = [ended(tmp_path, "run", f"2024010{day}-000000", size=1000) for day in range(1, 7)]
    assert prune(tmp_path, keep=4) == [folders[1], folders[0]]
    assert prune(tmp_path, keep=4, max_bytes=2500) == [folders[3], folders[2]]
    assert prune(tmp_path, keep=0, max_bytes=0) == [folders[4]]
    assert [run.folder for run in recent(tmp_path)] == [folders[5]]


def test_prune_leaves_what_lives_and_what_is_not_ours(tmp_path: Path) -> None:
    mine = new_folder(tmp_path, "mine")
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from nbaccel.session.runs import new_folder\n"
            "print(new_folder(pathlib.Path(sys.argv[1]), 'other'), flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    strangers = [tmp_path / "thesis", tmp_path / "20240101-000000-data-0a1b2c"]
    for folder in strangers:
        folder.mkdir()
        (folder / "precious.txt").write_text("x")
    ended(tmp_path, "newest", "20990101-000000")
    try:
        assert prune(tmp_path, keep=0, max_bytes=0) == []
    finally:
        other.communicate(timeout=30)
    assert prune(tmp_path, keep=0, max_bytes=0) == [theirs]
    (mine / LOCK).unlink()
    (mine / "run.json").write_text("{}")
    assert prune(tmp_path, keep=0, max_bytes=0) == [mine]
    assert all((folder / "precious.txt").exists() for folder in strangers)


def test_prune_is_not_fooled_by_a_pid_that_is_used_again(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, "x")
    owner = json.loads((folder / LOCK).read_text())
    if owner["started"] is None:
        pytest.skip("this platform does not say when a process started")
    (folder / LOCK).write_text(json.dumps({**owner, "started": owner["started"] - 1}))
    ended(tmp_path, "newest", "20990101-000000")
    assert prune(tmp_path, keep=0) == [folder]


def test_runs_of_another_host_are_left_for_a_week(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, "x")
    (folder / LOCK).write_text(json.dumps({"pid": 1, "started": 1, "host": "elsewhere"}))
    ended(tmp_path, "newest", "20990101-000000")
    assert prune(tmp_path, keep=0) == []
    past = time.time() - 8 * 86400
    os.utime(folder / LOCK, (past, past))
    os.utime(folder, (past, past))
    assert prune(tmp_path, keep=0) == [folder]


def test_prune_does_not_follow_links_out_of_the_root(tmp_path: Path) -> None:
    outside = ended(tmp_path / "outside", "x", "20240101-000000")
    root = tmp_path / "root"
    ended(root, "newest", "20990101-000000")
    (root / outside.name).symlink_to(outside)
    assert prune(root, keep=0, max_bytes=0) == []
    assert (outside / "rank-0.log").exists()
