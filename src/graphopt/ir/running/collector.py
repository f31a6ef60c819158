"""Control of Python's garbage collector, to keep it from scanning the same graphs repeatedly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_objects() -> Iterator[None]:
    """Exclude all existing objects from garbage collection inside the block.

    A graph consists of many small objects that refer to each other; a pass makes enough new ones to trigger several
    full collections, each of which would scan all programs of the process. If objects are frozen already, nothing
    is changed.
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
