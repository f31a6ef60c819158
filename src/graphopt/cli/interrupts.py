"""What Ctrl-C leaves behind: commands that keep something say so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Add to an interruption what is kept of the work inside the block; nothing is added where that is empty."""
    try:
        yield
    except KeyboardInterrupt as stop:
        told = kept()
        if told:
            stop.add_note(told)
        raise


def scores_in(work_dir: str | None) -> contextlib.AbstractContextManager[None]:
    """Say at an interruption where scores are kept, if they are."""
    kept = f"what was measured is kept in {work_dir}; the same command goes on from there"
    return on_interrupt(lambda: kept if work_dir is not None and os.path.isdir(work_dir) else "")
