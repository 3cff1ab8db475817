"""`%nbaccel status` and `%nbaccel vars` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbaccel.rank.namespace import Variable
from nbaccel.session.results import rank_ranges

if TYPE_CHECKING:
    from nbaccel.notebook.session import Session

__all__ = ["status_table", "variables_table"]

_PAGE = 4096


def status_table(session: Session) -> str:
    """A line for each rank: what it does, its process and memory."""
    if session.closed:
        return "the session has ended: %nbaccel start starts another"
    rows = [("rank", "state", "pid", "memory")]
    for known in session.state.ranks:
        state = "idle" if known.state in ("done", "failed") else known.state
        rows.append((str(known.rank), state, str(known.pid or ""), _memory(known.pid)))
    return f"{session!r}\n{_aligned(rows)}"


def variables_table(found: Mapping[int, Sequence[Variable]], *, by_size: bool = False) -> str:
    """A line for each name and for each group of ranks where it is the same; ≠ marks what differs."""
    names: dict[str, dict[int, Variable]] = {}
    for rank, variables in found.items():
        for variable in variables:
            names.setdefault(variable.name, {})[rank] = variable
    if not names:
        return "the ranks have no variables yet"
    rows = [("name", "", "ranks", "type", "shape", "dtype", "device", "bytes", "checksum", "value")]

    def largest(name: str) -> int:
        return max((one.bytes or 0) for one in names[name].values())

    for name in sorted(names, key=(lambda name: -largest(name)) if by_size else None):
        groups: dict[Variable, list[int]] = {}
        for rank, variable in names[name].items():
            groups.setdefault(variable, []).append(rank)
        differs = len(groups) > 1 or len(names[name]) < len(found)
        for variable, ranks in groups.items():
            rows.append((name, "≠" if differs else "", rank_ranges(ranks), *_cells(variable)))
    return _aligned(rows)


def _cells(variable: Variable) -> tuple[str, str, str, str, str, str, str]:
    shape = "" if variable.shape is None else f"({', '.join(map(str, variable.shape))})"
    size = "" if variable.bytes is None else f"{variable.bytes:,}"
    checksum = variable.checksum or "?"
    return variable.type, shape, variable.dtype, variable.device, size, checksum, variable.value


def _memory(pid: int | None) -> str:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return ""
    return f"{resident >> 20} MiB"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns; those that are empty everywhere are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
