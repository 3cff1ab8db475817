"""Seeds, and random states that are the same on all ranks."""

from __future__ import annotations

from nbaccel.compat.accelerate.utils.other import set_seed, synchronize_rng_state, synchronize_rng_states

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]
