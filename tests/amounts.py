"""How much the tests do: GRAPHOPT_THOROUGH=1 draws three times as many examples and runs every case."""

from __future__ import annotations

import os
from collections.abc import Sequence

THOROUGH = bool(os.environ.get("GRAPHOPT_THOROUGH"))


def examples(count: int) -> int:
    """Return how many examples a test draws that costs much."""
    return count if THOROUGH else max(4, count // 3)


def cases(first: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the cases of a test that costs much: ``others`` are of the kinds that ``first`` has."""
    return [*first, *(others if THOROUGH else ())]
