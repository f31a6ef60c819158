"""Python's garbage collector, kept from walking over the same graphs again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_objects() -> Iterator[None]:
    """Leave everything that exists now out of collections until the end.

    A graph is many small objects that point at each other; a pass makes enough new ones for several full
    collections, each of which would walk over all programs of the process. Somebody who froze objects before
    keeps that as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


__all__ = ["settled_objects"]
