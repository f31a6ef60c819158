"""How many examples property tests draw: about half of what they are written with, all with GRAPHOPT_THOROUGH=1."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """Return how many examples a test draws that costs much."""
    return count if os.environ.get("GRAPHOPT_THOROUGH") else max(4, count // 2)
