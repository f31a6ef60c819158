"""Candidates from the program's earlier predictions (arXiv 2408.08696)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.errors import UsageError
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter, Seen
from ..sampling import Sampling


class TokenRecycling(Drafter):
    """Remembers the successors that the program last predicted for each token, and proposes a tree of them.

    The tree has the node budget of ``widths``: the first successor of a level's first nodes gets the most children.
    Nothing is proposed for a token that was never seen.

    Args:
        successors: number of successors kept for each token.
        widths: number of nodes at each level of the tree.

    Raises:
        UsageError: a number below 1.
    """

    name = "token-recycling"

    def __init__(self, successors: int = 4, widths: Sequence[int] = (4, 6, 5, 3, 2)):
        if successors < 1 or not widths or min(widths) < 1:
            raise UsageError("token-recycling: successors and widths must be at least 1")
        self.successors, self.widths = successors, tuple(widths)
        self.room = sum(self.widths)
        self.table = torch.zeros(0, successors, dtype=torch.int64)

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Keep the table from earlier texts if the vocabulary is the same."""
        super().begin(decoder, rows, sampling)
        self.logits = decoder.cache.logits
        self.successors = min(self.successors, decoder.vocabulary)
        if self.table.shape != (decoder.vocabulary, self.successors):
            self.table = torch.full((decoder.vocabulary, self.successors), -1, dtype=torch.int64)

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Grow the tree level by level; a candidate's cost is the sum of ranks on its path."""
        tokens: list[int] = []
        parents: list[int] = []
        level: list[tuple[int, int, int]] = [(0, -1, row[-1])]
        for width in self.widths[:room]:
            options = [
                (cost + rank, parent, int(token))
                for cost, parent, last in level
                for rank, token in enumerate(self.table[last].tolist())
                if token >= 0
            ]
            level = []
            for cost, parent, token in sorted(options, key=lambda o: o[0])[:width]:
                level.append((cost, len(tokens), token))
                tokens.append(token)
                parents.append(parent)
        return Draft(tokens, parents)

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Store the most likely successors of every computed token, accepted or not; the latest overwrites earlier ones."""
        best = seen.outputs[self.logits].topk(self.successors, dim=-1).indices.cpu()
        for token, successors in zip(seen.tokens, best, strict=True):
            self.table[token] = successors
