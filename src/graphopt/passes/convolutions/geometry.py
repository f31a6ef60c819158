"""Where a convolution's taps lie along one axis, and what lies beyond the ends of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis: output i reads inputs ``stride * i + first + step * k`` for tap k of ``count``.

    ``high`` is the padding at the far end as a convolution has it; ``-first`` that at the near end. Negative
    padding means that the ends of the input are not read.
    """

    first: int = 0
    step: int = 1
    count: int = 1
    stride: int = 1
    high: int = 0

    @property
    def last(self) -> int:
        """Offset of the last tap."""
        return self.first + self.step * (self.count - 1)

    @property
    def low(self) -> int:
        """Padding at the near end."""
        return -self.first

    @property
    def extends(self) -> bool:
        """Whether values beyond the ends are read."""
        return self.low > 0 or self.high > 0


def lattice(axes: Sequence[Axis]) -> tuple[int, int, int]:
    """Return first offset, step and count of the lattice that holds all taps of several axes."""
    first = min(a.first for a in axes)
    last = max(a.last for a in axes)
    step = 0
    for axis in axes:
        step = math.gcd(step, axis.first - first)
        if axis.count > 1:
            step = math.gcd(step, axis.step)
    step = step or 1
    return first, step, (last - first) // step + 1


def one_after_another(first: Axis, second: Axis) -> Axis:
    """Return the axis of two convolutions in sequence, the lattice included."""
    steps = [s for s, c in ((first.step, first.count), (first.stride * second.step, second.count)) if c > 1]
    step = math.gcd(*steps) if steps else 1
    start = first.first + first.stride * second.first
    end = first.last + first.stride * second.last
    return Axis(
        start,
        step,
        (end - start) // step + 1,
        first.stride * second.stride,
        first.high + first.stride * second.high,
    )
