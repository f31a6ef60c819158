"""Where a row ends, which may be inside of what one step commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.errors import UsageError


@dataclass(frozen=True)
class Stop:
    """When a row has come to its end.

    Attributes:
        max_new_tokens: how many tokens it gets at most.
        tokens: after any of these, which is kept.
        sequences: after any of these runs of tokens, which are kept.
    """

    max_new_tokens: int
    tokens: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens is at least 1")
        if any(not sequence for sequence in self.sequences):
            raise UsageError("a stop sequence has no tokens")

    def cut(self, new: Sequence[int], commit: Sequence[int]) -> tuple[list[int], bool]:
        """Return what of a commit is kept, and whether the row ends there.

        Args:
            new: the tokens that the row got before.
            commit: those it would get now.
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
