"""Roofline model of time: a call takes as long as the slower of its arithmetic and its memory traffic.

``t = max(FLOPs / peak, bytes / bandwidth)`` (LLM-Viewer, arXiv 2402.16363), summed over calls: nothing
overlaps. Peaks are those of the device as given; :meth:`Device.derated` gives what kernels reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .devices import Device

Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Timing:
    """The time of a call, or of a program.

    Attributes:
        flops: floating-point operations.
        bytes: bytes moved.
        seconds: total time.
        memory_seconds: the part spent in calls that memory limits.
        bound: what limits a call; of a program, what limits it for more of the time.
    """

    flops: int
    bytes: int
    seconds: float
    memory_seconds: float
    bound: Bound

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.flops / self.bytes if self.bytes else math.inf


def time_call(flops: int, bytes_moved: int, device: Device, kind: str = "bfloat16") -> Timing:
    """Return the time of one call.

    Args:
        flops: floating-point operations.
        bytes_moved: bytes to and from memory.
        device: where it runs.
        kind: element type of the arithmetic.

    Returns:
        Bound by memory if and only if FLOPs per byte are below the device's ridge.
    """
    arithmetic = flops / device.peak(kind)
    memory = bytes_moved / device.bandwidth
    limited = bytes_moved > 0 and flops < bytes_moved * device.ridge(kind)
    seconds = max(arithmetic, memory)
    return Timing(
        flops, bytes_moved, seconds, seconds if limited else 0.0, "memory" if limited else "compute"
    )


def total(timings: Iterable[tuple[Timing, int]]) -> Timing:
    """Return the total time of calls in sequence; each comes with the number of times it is made."""
    flops = moved = 0
    seconds = memory = 0.0
    for timing, count in timings:
        flops += count * timing.flops
        moved += count * timing.bytes
        seconds += count * timing.seconds
        memory += count * timing.memory_seconds
    return Timing(flops, moved, seconds, memory, "memory" if memory > seconds - memory else "compute")
