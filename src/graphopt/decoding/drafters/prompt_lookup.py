"""Candidates from the text itself: what followed an earlier occurrence of its last tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import UsageError
from ..drafts import Draft, Drafter


class PromptLookup(Drafter):
    """Proposes what followed the latest earlier occurrence of a row's last tokens; no model is involved.

    Args:
        tokens: maximum number of tokens proposed.
        longest: length of the longest suffix that is looked up; shorter ones are tried next.
        shortest: length of the shortest suffix that is looked up.

    Raises:
        UsageError: a number below 1, or shortest above longest.
    """

    name = "prompt-lookup"

    def __init__(self, tokens: int = 8, longest: int = 3, shortest: int = 1):
        if tokens < 1 or not 1 <= shortest <= longest:
            raise UsageError("prompt-lookup: tokens must be at least 1, shortest from 1 to longest")
        self.room, self.longest, self.shortest = tokens, longest, shortest

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Look up the row's suffix in the row itself."""
        row = list(row)
        for size in range(min(self.longest, len(row) - 1), self.shortest - 1, -1):
            suffix = row[-size:]
            for start in range(len(row) - size - 1, -1, -1):
                if row[start : start + size] == suffix:
                    continuation = row[start + size : start + size + min(self.room, room)]
                    return Draft.line(continuation)
        return Draft()
