"""Candidates from the text itself: what followed when its last tokens stood there before."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import UsageError
from ..drafts import Draft, Drafter


class PromptLookup(Drafter):
    """Proposes what followed the latest earlier occurrence of a row's last tokens; no model takes part.

    Args:
        tokens: how many are proposed at most.
        longest: of the row's last tokens so many are looked for, then fewer.
        shortest: down to so many.

    Raises:
        UsageError: a number below 1, or shortest above longest.
    """

    name = "prompt-lookup"

    def __init__(self, tokens: int = 8, longest: int = 3, shortest: int = 1):
        if tokens < 1 or not 1 <= shortest <= longest:
            raise UsageError("prompt-lookup: tokens is at least 1, shortest from 1 to longest")
        self.room, self.longest, self.shortest = tokens, longest, shortest

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Look the row's end up in the row."""
        row = list(row)
        for size in range(min(self.longest, len(row) - 1), self.shortest - 1, -1):
            suffix = row[-size:]
            for start in range(len(row) - size - 1, -1, -1):
                if row[start : start + size] == suffix:
                    continuation = row[start + size : start + size + min(self.room, room)]
                    return Draft.line(continuation)
        return Draft()
