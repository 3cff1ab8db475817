"""What a rank has to work with: memory, arithmetic, links."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Machine", "machine_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One rank's share of its host. Bytes, bytes per second, operations per second."""

    device_type: str
    device_bytes: int
    host_bytes: int
    flops: float
    narrow_flops: float
    """In bf16 or fp16."""
    memory_bandwidth: float
    link_bandwidth: float
    """Between ranks of a host."""
    network_bandwidth: float = 1.25e9
    """Between hosts: 10 Gbit/s unless somebody knows better."""
    host_bandwidth: float = 2.5e10
    """Between host memory and the device."""
    packing_bandwidth: float = 1e12
    """At which shards are copied into one buffer and out of it, around each collective."""
    latency: float = 5e-5
    """Seconds of a collective that carries nothing."""
    overlaps: bool = True
    """Whether communication goes on beside computing: not where both need the same cores."""


# (float32 with tensor cores, bf16, memory, link between ranks): what real training reaches of the data sheets,
# about half of the peak arithmetic and four fifths of the bandwidths.
_GPUS: dict[str, tuple[float, float, float, float]] = {
    "B200": (5.5e14, 1.1e15, 6.4e12, 7.2e11),
    "H200": (2.5e14, 5.0e14, 3.8e12, 3.6e11),
    "H100": (2.5e14, 5.0e14, 2.7e12, 3.6e11),
    "A100": (7.8e13, 1.6e14, 1.4e12, 2.4e11),
    "L40": (4.5e13, 9.0e13, 7.0e11, 2.0e10),
    "L4": (3.0e13, 6.0e13, 2.4e11, 2.0e10),
    "A10": (3.0e13, 6.0e13, 4.8e11, 2.0e10),
    "V100": (7.0e12, 6.0e13, 7.2e11, 1.2e11),
    "T4": (4.0e12, 3.0e13, 2.5e11, 1.0e10),
}
_OTHER_GPU = (2.0e13, 6.0e13, 5.0e11, 2.0e10)
_CORE = (4.0e10, 4.0e10, 6.0e9, 1.0e9)
"""One core of a server, and the memory and loopback bandwidth that come to a rank."""
_CORE_PACKING = 1e9
"""Seen with FSDP2 on one core: torch copies row by row there."""


def machine_for(
    name: str, *, device_type: str, device_bytes: int, host_bytes: int, cores: float = 1.0
) -> Machine:
    """What a rank on a device of that name has; a GPU that is not known counts as a middling one.

    Args:
        name: the GPU's product name; not read for a CPU.
        device_bytes: the device's memory; of a CPU, this rank's share of the host's.
        cores: those that compute for this rank, on a CPU.
    """
    if device_type == "cpu":
        flops, narrow, memory, link = _CORE
        flops, narrow = flops * cores, narrow * cores
        latency = 3e-4
    else:
        words = name.upper().replace("-", " ").split()
        known = (spec for key, spec in _GPUS.items() if any(word.startswith(key) for word in words))
        flops, narrow, memory, link = next(known, _OTHER_GPU)
        latency = 3e-5
    return Machine(
        device_type=device_type,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        flops=flops,
        narrow_flops=narrow,
        memory_bandwidth=memory,
        link_bandwidth=link,
        packing_bandwidth=_CORE_PACKING if device_type == "cpu" else memory,
        latency=latency,
        overlaps=device_type != "cpu",
    )
