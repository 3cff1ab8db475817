"""`%load_ext nbaccel` and `%unload_ext nbaccel`."""

from __future__ import annotations

from typing import Any

from nbaccel.notebook.magics import RankMagics

__all__ = ["load", "unload"]


def load(shell: Any) -> None:
    """Register the magics, and completion by the ranks' names."""
    magics = RankMagics(shell)
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.match_ranks)


def unload(shell: Any) -> None:
    """End the session, and undo what `load` did."""
    magics = shell.magics_manager.registry.pop("RankMagics", None)
    if magics is None:
        return
    magics.set_auto(False)
    magics.use(None)
    if magics.match_ranks in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(magics.match_ranks)
    shell.magics_manager.magics["line"].pop("nbaccel", None)
    shell.magics_manager.magics["line"].pop("rank_debug", None)
    shell.magics_manager.magics["cell"].pop("ranks", None)
