"""The decoder that runs a program under a policy."""

from __future__ import annotations

from typing import Any

from ..ir.errors import UsageError
from ..ir.program import Program
from .bounded import BoundedDecoder
from .cached import CachedDecoder
from .policies import ByLayer, CachePolicy, Policy, Reading
from .selecting import SelectingDecoder


def decoder_under(
    policy: CachePolicy | None,
    program: Program,
    batch: int,
    capacity: int,
    room: int = 0,
    **options: Any,
) -> CachedDecoder:
    """Return a decoder whose caches hold, and whose tokens read, what a policy says; everything if it is None.

    Args:
        policy: of the caches.
        program: after insert-cache.
        batch: number of rows.
        capacity: number of positions of the longest text.
        room: slots for candidates after a row.
        options: as for :class:`CachedDecoder`.

    Raises:
        UsageError: the program does not allow the policy.
    """
    if policy is not None and not isinstance(policy, (Policy, ByLayer, Reading)):
        raise UsageError(
            f"cache is {policy!r}; it is a policy, or its name with options", hint="window{budget=1024}"
        )
    if policy is None:
        return CachedDecoder(program, batch, capacity, **options)
    if isinstance(policy, Reading):
        return SelectingDecoder(program, batch, capacity, policy, **options)
    return BoundedDecoder(program, batch, capacity, policy, room, **options)
