"""Random generators: seed them all, make them equal on all ranks, save them and put them back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import torch

from nbaccel.core.comm.collectives import broadcast_object_list
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["GeneratorName", "RngState", "get_states", "set_seed", "set_states", "synchronize_rng_states"]

GeneratorName = Literal["torch", "cuda", "xpu", "xla", "mps", "numpy", "python", "generator"]


def set_seed(seed: int, *, rank: int = 0, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seeds Python's, NumPy's and torch's generators on every device.

    Args:
        device_specific: adds `rank` to the seed, so that ranks draw different numbers.
        deterministic: also makes torch use deterministic algorithms only.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"a seed must be an int of at least 0, not {seed!r}")
    if device_specific:
        seed += rank
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        with contextlib.suppress(ImportError):
            import numpy
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the CPU's and every accelerator's
    if (xla := sys.modules.get("torch_xla")) is not None and xla._XLAC._xla_runtime_is_initialized():
        xla.manual_seed(seed)  # but not XLA's
    if deterministic:
        torch.use_deterministic_algorithms(True)


def get_states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators this rank may draw from, as plain data and tensors."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *(float(r) for r in rest))
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "xpu":
        states["xpu"] = torch.xpu.get_rng_state(device)
    elif device.type == "xla":
        states["xla"] = int(sys.modules["torch_xla.core.xla_model"].get_rng_state())
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_states(states: dict[str, Any], device: torch.device) -> None:
    """Puts back what `get_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        import numpy

        kind, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), int(position), int(has_gauss), cached))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    if "xpu" in states and device.type == "xpu":
        torch.xpu.set_rng_state(states["xpu"].cpu(), device)
    if "xla" in states and device.type == "xla":
        sys.modules["torch_xla.core.xla_model"].set_rng_state(states["xla"])
    if "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"].cpu())


@final
class RngState:
    """The generators of this rank as something that can be saved (`Stateful`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """The states now."""
        return get_states(self._device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts them back."""
        set_states(state_dict, self._device)


def synchronize_rng_states(
    names: Sequence[GeneratorName], *, world: World, generator: torch.Generator | None = None
) -> None:
    """Gives every rank rank 0's states of the named generators ("generator": the one passed)."""
    known = get_states(world.device)
    wanted: dict[str, Any] = {}
    for name in names:
        if name == "generator":
            if generator is not None:
                wanted[name] = generator.get_state()
        elif name in known:
            wanted[name] = known[name]
        else:
            raise ConfigError(f"there is no generator {name!r} here; there are {', '.join(known)}")
    received = broadcast_object_list([wanted], world=world)[0]
    if generator is not None and "generator" in received:
        generator.set_state(received.pop("generator"))
    set_states({**known, **received}, world.device)


@contextlib.contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the global generators."""
    states = get_states(device)
    try:
        yield
    finally:
        set_states(states, device)
