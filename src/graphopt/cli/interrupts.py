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


def scores_in(work_dir: str | None) -> str:
    """Say where scores are kept, if they are."""
    if work_dir is None or not os.path.isdir(work_dir):
        return ""
    return f"what was measured is kept in {work_dir}; the same command goes on from there"
