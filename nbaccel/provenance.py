"""Where a run comes from: the git commit of its code and the versions of its packages."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

__all__ = ["git_commit", "package_versions"]

_PACKAGES = (
    "nbaccel",
    "torch",
    "numpy",
    "cloudpickle",
    "ipykernel",
    "transformers",
    "accelerate",
    "lightning-fabric",
)


def package_versions() -> dict[str, str]:
    """The versions of those packages that decide what a run does and that are installed, by name."""
    return {package: found for package in _PACKAGES if (found := _version(package))}


def _version(package: str) -> str | None:
    """As `importlib.metadata.version`, which parses the whole file as a message: 1 ms each, in every launch."""
    try:
        installed = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    found = re.search(r"^Version:\s*(\S+)", text.partition("\n\n")[0], re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def git_commit(path: Path) -> str | None:
    """The commit checked out in the git repository that holds `path`; None outside one, or before the
    first commit. Reads the files itself: a subprocess would cost more than the launch.

    Source: gitrepository-layout(5).
    """
    path = path.absolute()
    for folder in (path, *path.parents):
        git = folder / ".git"
        if git.is_file():  # a worktree or a submodule
            git = folder / _text(git).removeprefix("gitdir:").strip()
        if (git / "HEAD").is_file():
            return _resolve(git, "HEAD")
    return None


def _resolve(git: Path, ref: str) -> str | None:
    shared = git / (_text(git / "commondir").strip() or ".")
    for _ in range(5):  # git's own bound on symbolic references
        text = (_text(git / ref) or _text(shared / ref)).strip()
        if not text:
            return _packed(shared, ref)
        if not text.startswith("ref:"):
            return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None
        ref = text.removeprefix("ref:").strip()
    return None


def _packed(shared: Path, ref: str) -> str | None:
    for line in _text(shared / "packed-refs").splitlines():
        commit, _, name = line.partition(" ")
        if name == ref:
            return commit
    return None


def _text(path: Path) -> str:
    """The file's text; empty when there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
