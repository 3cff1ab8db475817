"""Imports go down the floors only; the floors are in the design."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "nbaccel"
FLOORS = {
    "errors": -2, "ownership": -2, "gloo": -2, "numbered": -2, "whole": -2, "checks": -1, "parallel": 0, "fp8": 0,
    "config": 1, "layout": 2, "wire": 2, "core": 3, "rank": 3, "engines": 4, "session": 5, "notebook": 6, "cli": 6,
    "compat": 7
}  # fmt: skip
# From the ground up; what stands on one line does not know its neighbours.
CORE = """
    inner_optimizer nested precision refused tpu
    world
    comm model trackers
    async_io checkpoint data logger memory processes rng xla
    load_model plan save_model sharding
    offload zero
    inference merge planning
    strategies
    loop
    assembly regrouping saving
    choosing preparing
    accelerator
    local_sgd selfcheck
"""
# A type's name only; and the text of an error, for which the asked object's class is looked up.
UPWARDS = {("tpu", "world"), ("refused", "accelerator")}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A file's module, from the package on: "wire.channel"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def imports(path: Path, *, everywhere: bool) -> list[tuple[str, int]]:
    """(module, line) of each import statement; those inside functions only if `everywhere`."""
    tree = ast.parse(path.read_text())
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree) if everywhere else _at_import(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported, but for type checking."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def floor(module: str) -> str:
    return module.removeprefix("nbaccel").lstrip(".").partition(".")[0]


def test_imports_go_down_only() -> None:
    found = []
    for path in FILES:
        mine = floor(name_of(path))
        for module, line in imports(path, everywhere=True):
            theirs = floor(module) if module.startswith("nbaccel.") else mine
            if theirs not in FLOORS or mine not in FLOORS or theirs == mine:
                continue  # the package's own face, or a name of it
            if FLOORS[theirs] >= FLOORS[mine]:
                found.append(f"{path}:{line}: {mine} imports {theirs}")
    assert not found


def room(module: str) -> str:
    """The room of the core that a module is in: "core.data.plan" is in "data"."""
    return module.removeprefix("nbaccel.").removeprefix("core").lstrip(".").partition(".")[0]


def test_imports_within_the_core_go_down_only() -> None:
    levels = {name: level for level, line in enumerate(CORE.split("\n")) for name in line.split()}
    files = [path for path in FILES if floor(name_of(path)) == "core" and room(name_of(path))]
    assert levels.keys() == {room(name_of(path)) for path in files}
    for path in files:
        mine = room(name_of(path))
        for module, line in imports(path, everywhere=True):
            theirs = room(module) if module.startswith("nbaccel.core.") else mine
            if theirs != mine and (mine, theirs) not in UPWARDS:
                assert levels[theirs] < levels[mine], f"{path}:{line}: {mine} imports {theirs}"


def test_torch_is_imported_late_when_it_is_not_the_core() -> None:
    found = [
        f"{path}:{line}: {module}"
        for path in FILES
        if floor(name_of(path)) not in ("core", "rank", "compat")
        for module, line in imports(path, everywhere=False)
        if module.partition(".")[0] == "torch"
    ]
    assert not found, f"import torch when they are imported: {found}"


def test_front_end_is_known_to_the_notebook_only() -> None:
    known = ("IPython", "ipywidgets", "ipykernel")
    # cells read and run by IPython's own machinery: in the rank
    theirs = ("rank.cells", "rank.shell", "rank.display")
    found = [
        f"{path}:{line}: {module}"
        for path in FILES
        if floor(name_of(path)) != "notebook" and name_of(path) not in theirs
        for module, line in imports(path, everywhere=True)
        if module.partition(".")[0] in known
    ]
    assert not found, f"know the front end: {found}"


def test_no_strategy_imports_another() -> None:
    for path in sorted((PACKAGE / "core" / "strategies").glob("*.py")):
        for module, line in imports(path, everywhere=True):
            part = module.removeprefix("nbaccel.core.strategies.").partition(".")[0]
            if module.startswith("nbaccel.core.strategies.") and path.stem != "__init__":
                assert part in ("base", path.stem), f"{path}:{line}: {path.stem} imports {part}"
