"""Candidates for the next tokens, as a tree, and the base class of drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from ..ir.errors import UsageError
from .sampling import Sampling, draw

if TYPE_CHECKING:
    from .cached import CachedDecoder


@dataclass
class Draft:
    """Candidates for the tokens after a row, parents before children.

    Attributes:
        tokens: the token of each candidate.
        parents: the candidate that each one follows; -1 for the row itself.
        odds: (vocabulary,) the distribution that each token was sampled from; empty if none was sampled.
        probes: mask tokens that are computed beside the candidates and never committed: the node that each follows (-1
            for the row, then candidates, then earlier probes), and which mask token it is, counted from 1.

    Raises:
        UsageError: a parent does not come before its child.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    odds: list[torch.Tensor] = field(default_factory=list)
    probes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise UsageError("candidates are listed parents before children, with one parent each")
        if self.odds and (len(self.odds) != len(self.tokens) or not self.chain):
            raise UsageError("distributions belong to a chain of candidates, one each")
        if any(not -1 <= p < len(self.tokens) + i or mark < 1 for i, (p, mark) in enumerate(self.probes)):
            raise UsageError("probes follow what comes before them, and mask tokens are numbered from 1")

    @classmethod
    def line(cls, tokens: Sequence[int], odds: Sequence[torch.Tensor] = ()) -> Draft:
        """Return a chain of candidates, each following the one before."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), list(odds))

    @property
    def chain(self) -> bool:
        """Tell whether each candidate follows the one before."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    @property
    def depths(self) -> list[int]:
        """Distance of each candidate from the row's last token, counted from 1."""
        return self.all_depths[: len(self.tokens)]

    @property
    def all_depths(self) -> list[int]:
        """Depths of the candidates, followed by those of the probes."""
        depths: list[int] = []
        for parent in self.all_parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def likeliest_first(self) -> Draft:
        """Return the same tree in depth-first order, so that the accepted path is usually a prefix.

        Caches need not be rearranged when it is.
        """
        if self.odds or self.probes or self.chain:
            return self
        following: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents):
            following[parent + 1].append(node)
        order: list[int] = []
        work = following[0][::-1]
        while work:
            node = work.pop()
            order.append(node)
            work.extend(following[node + 1][::-1])
        new_index = {-1: -1} | {old: new for new, old in enumerate(order)}
        return Draft([self.tokens[n] for n in order], [new_index[self.parents[n]] for n in order])

    @property
    def width(self) -> int:
        """Number of positions it takes after the row's last token."""
        return len(self.tokens) + len(self.probes)

    @property
    def all_parents(self) -> list[int]:
        """Parents of the candidates, followed by those of the probes."""
        return [*self.parents, *(parent for parent, _ in self.probes)]

    def children(self, node: int) -> list[int]:
        """Return the candidates that follow a node; -1 is the row itself."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def cut(self, depth: int) -> Draft:
        """Return the candidates up to a depth."""
        remaining = [i for i, d in enumerate(self.depths) if d <= depth]
        if len(remaining) == len(self.tokens):
            return self
        new_index = {-1: -1} | {old: new for new, old in enumerate(remaining)}
        probes: list[tuple[int, int]] = []
        for number, (parent, mark) in enumerate(self.probes):
            if parent in new_index:  # probes that follow a removed candidate are removed too
                new_index[len(self.tokens) + number] = len(remaining) + len(probes)
                probes.append((new_index[parent], mark))
        return Draft(
            [self.tokens[i] for i in remaining],
            [new_index[self.parents[i]] for i in remaining],
            [self.odds[i] for i in remaining] if self.odds else [],
            probes,
        )


@dataclass
class Seen:
    """What a step computed for one row.

    Attributes:
        tokens: the row's last token and the candidates, as they were fed in.
        draft: the candidates, with their probes.
        path: indices into ``tokens`` of the accepted ones, starting with the row's last token.
        outputs: what the program computed at each token, then at each probe: (tokens, ...) by name.
    """

    tokens: list[int]
    draft: Draft
    path: list[int]
    outputs: Mapping[str, torch.Tensor]


class Drafter:
    """Proposes candidates. The generated text does not depend on the proposals, only the speed does.

    Rows are numbered by their current position in the batch.
    """

    name: ClassVar[str] = ""
    outputs: tuple[str, ...] = ()
    """Outputs of the program that it reads besides the logits."""

    room: int = 0
    """Maximum number of candidates it proposes."""

    generator: torch.Generator
    """For sampling candidates; set by the loop from its seed, independent of the loop's own sampling."""

    threshold: float = 0.0
    """Candidates end when the most likely token has less than this probability."""

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Start with new rows.

        Args:
            decoder: the program that verifies the candidates.
            rows: the prompts.
            sampling: how tokens are chosen.
        """
        self.decoder, self.sampling = decoder, sampling

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Return candidates for the tokens that follow each row.

        Args:
            rows: all tokens of each row.
            room: maximum depth of the candidates of each row.
        """
        return [
            self.propose_row(number, row, depth)
            for number, (row, depth) in enumerate(zip(rows, room, strict=True))
        ]

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Return candidates for one row."""
        return Draft()

    def take(self, logits: torch.Tensor) -> tuple[int | None, torch.Tensor | None]:
        """Return a candidate from logits (vocabulary,), and its distribution if sampled; None below the threshold."""
        likely = logits.double().softmax(-1) if self.threshold else None
        if likely is not None and float(likely.max()) < self.threshold:
            return None, None
        if self.sampling.greedy:
            return int(logits.argmax()), None
        odds = self.sampling.distribution(logits.cpu())
        return draw(odds, self.generator), odds

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Learn from a step: ``row`` including the tokens it committed, and what was computed."""

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
