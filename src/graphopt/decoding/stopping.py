"""When a row ends, which may be in the middle of what one step commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.errors import UsageError


@dataclass(frozen=True)
class Stop:
    """Conditions under which a row ends.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        tokens: any of these ends the row, and is kept.
        sequences: any of these sequences of tokens ends the row, and is kept.
    """

    max_new_tokens: int
    tokens: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1")
        if any(not sequence for sequence in self.sequences):
            raise UsageError("a stop sequence has no tokens")

    def cut(self, new: Sequence[int], commit: Sequence[int]) -> tuple[list[int], bool]:
        """Return the part of a commit that is kept, and whether the row ends there.

        Args:
            new: the new tokens that the row has so far.
            commit: the tokens that a step adds.
        """
        row = list(new)
        accepted: list[int] = []
        for token in commit:
            row.append(token)
            accepted.append(token)
            ended = token in self.tokens or any(
                len(row) >= len(s) and tuple(row[-len(s) :]) == s for s in self.sequences
            )
            if ended or len(row) >= self.max_new_tokens:
                return accepted, True
        return accepted, False
