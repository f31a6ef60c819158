"""Hints for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest known ones, and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}known are {', '.join(names) or 'none'}"
