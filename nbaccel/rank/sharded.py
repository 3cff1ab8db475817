"""Models that FSDP2 shards, in a session's rank: what a step that was broken off left in them is forgotten."""

from __future__ import annotations

import gc
import sys
from typing import Any

__all__ = ["forget_broken_steps"]


def forget_broken_steps() -> None:
    """Lets each sharded model begin its next step as if the last one had not begun.

    An exception in the middle of forward or backward, an interrupt too, leaves blocks gathered that torch takes for
    freshly gathered, and gradients that would be added to the next ones; ranks stopped at different places then
    call different collectives. Parameters stay as they are. Torch before 2.13 cannot do it.
    """
    for root in _roots():
        for state in root._get_fsdp_state()._state_ctx.all_states:
            for group in state._fsdp_param_groups:
                group._all_gather_result = None  # of connections that may be gone: waiting would not end
                for held in group.fsdp_params:
                    held.unsharded_accumulated_grad = None
                    if hasattr(held, "_unsharded_param"):
                        held._unsharded_param.grad = None
        root.reset_iter_state()


def _roots() -> list[Any]:
    """Every live model that has been called, by the module that was; objects from before the fork are frozen and
    not looked at."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    if kind is None or not hasattr(kind, "reset_iter_state"):
        return []
    found = [one for one in gc.get_objects() if issubclass(type(one), kind)]
    return [one for one in found if one._get_fsdp_state()._is_root]
