"""The git commit of a folder, read without git."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from nbaccel.provenance import git_commit, package_versions


def test_versions_are_those_that_the_library_reads_out_of_whole_files() -> None:
    versions = package_versions()
    assert versions == {name: importlib.metadata.version(name) for name in versions}
    assert {"nbaccel", "torch", "cloudpickle"} <= versions.keys()


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_commit_is_what_git_says(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    repo = tmp_path / "repo"
    (repo / "sub" / "deep").mkdir(parents=True)
    git(repo, "init", "-q")
    assert git_commit(repo) is None
    git(repo, "commit", "-q", "--allow-empty", "-m", "one")
    first = git(repo, "rev-parse", "HEAD")
    assert git_commit(repo / "sub" / "deep") == first
    git(repo, "branch", "side/one")
    git(repo, "commit", "-q", "--allow-empty", "-m", "two")
    second = git(repo, "rev-parse", "HEAD")
    git(repo, "pack-refs", "--all")
    assert not (repo / ".git" / "refs" / "heads" / "main").exists()
    assert git_commit(repo) == second
    git(repo, "worktree", "add", "-q", str(tmp_path / "tree"), "side/one")
    assert git_commit(tmp_path / "tree") == first
    git(repo, "checkout", "-q", "--detach", first)
    assert git_commit(repo) == first
