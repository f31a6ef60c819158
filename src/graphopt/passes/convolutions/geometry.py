"""A convolution's kernel offsets along one axis, and its padding beyond the ends of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis: output i reads inputs ``stride * i + first + step * k`` for k from 0 to ``count - 1``.

    ``high`` is the convolution's padding at the far end, ``-first`` that at the near end. Negative padding means
    that the ends of the input are not read.
    """

    first: int = 0
    step: int = 1
    count: int = 1
    stride: int = 1
    high: int = 0

    @property
    def last(self) -> int:
        """The last kernel offset."""
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
    """Return first offset, step and count of the lattice that holds the kernel offsets of several axes."""
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
    """Return the axis of two convolutions in sequence, with the lattice of their joint kernel offsets."""
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
