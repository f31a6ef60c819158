"""What may come next: candidates as a tree, and who proposes them."""

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
        tokens: of each candidate.
        parents: the candidate that each follows; -1 follows the row itself.
        odds: (vocabulary,) the distribution that each token was drawn from; empty where none was drawn.
        probes: mask tokens that are computed beside the candidates and never committed: the node that each follows (-1
            the row, then candidates, then probes before it), and which mask token it is, from 1 on.

    Raises:
        UsageError: a parent does not come before its child.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    odds: list[torch.Tensor] = field(default_factory=list)
    probes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise UsageError("candidates are given parents before children, one parent each")
        if self.odds and (len(self.odds) != len(self.tokens) or not self.chain):
            raise UsageError("distributions belong to a chain of candidates, one each")
        if any(not -1 <= p < len(self.tokens) + i or mark < 1 for i, (p, mark) in enumerate(self.probes)):
            raise UsageError("probes follow what comes before them, and mask tokens are numbered from 1")

    @classmethod
    def line(cls, tokens: Sequence[int], odds: Sequence[torch.Tensor] = ()) -> Draft:
        """Return candidates each of which follows the one before."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), list(odds))

    @property
    def chain(self) -> bool:
        """Tell whether each candidate follows the one before."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    @property
    def depths(self) -> list[int]:
        """How many tokens after the row's last each candidate stands, from 1 on."""
        return self.all_depths[: len(self.tokens)]

    @property
    def all_depths(self) -> list[int]:
        """The same of candidates, and after them of probes."""
        depths: list[int] = []
        for parent in self.all_parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def likeliest_first(self) -> Draft:
        """Return the same tree path after path, first children first: what is accepted then mostly lies at its beginning.

        Caches need not be rearranged where it does.
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
        """How many places it takes after the row's last token."""
        return len(self.tokens) + len(self.probes)

    @property
    def all_parents(self) -> list[int]:
        """What each candidate, and after them each probe, follows."""
        return [*self.parents, *(parent for parent, _ in self.probes)]

    def children(self, node: int) -> list[int]:
        """Return the candidates that follow one; -1 for the row itself."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def cut(self, depth: int) -> Draft:
        """Return the candidates of at most a depth."""
        remaining = [i for i, d in enumerate(self.depths) if d <= depth]
        if len(remaining) == len(self.tokens):
            return self
        new_index = {-1: -1} | {old: new for new, old in enumerate(remaining)}
        probes: list[tuple[int, int]] = []
        for number, (parent, mark) in enumerate(self.probes):
            if parent in new_index:  # what follows a candidate that is cut goes with it
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
    """What a step showed of one row.

    Attributes:
        tokens: the row's last token and the candidates, as they were fed.
        draft: the candidates, with their probes.
        path: which of them were accepted, the row's last token first.
        outputs: what the program computed at each of them, and after them at probes: (tokens, ...) by name.
    """

    tokens: list[int]
    draft: Draft
    path: list[int]
    outputs: Mapping[str, torch.Tensor]


class Drafter:
    """Proposes candidates. Whatever it proposes, what is generated stays the same; only speed depends on it.

    Rows are numbered as they stand in the batch at the moment.
    """

    name: ClassVar[str] = ""
    outputs: tuple[str, ...] = ()
    """What it reads of the program besides the logits."""

    room: int = 0
    """How many candidates it proposes at most."""

    generator: torch.Generator
    """Of candidates that are drawn; set by the loop from its seed, apart from the loop's own draws."""

    threshold: float = 0.0
    """Candidates end where the most likely token has less than this probability."""

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Take up new rows.

        Args:
            decoder: the program that decides.
            rows: their beginnings.
            sampling: how tokens are taken.
        """
        self.decoder, self.sampling = decoder, sampling

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Return candidates for what follows each row.

        Args:
            rows: all tokens of each.
            room: how deep candidates may stand.
        """
        return [
            self.propose_row(number, row, depth)
            for number, (row, depth) in enumerate(zip(rows, room, strict=True))
        ]

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Return candidates for one row."""
        return Draft()

    def take(self, logits: torch.Tensor) -> tuple[int | None, torch.Tensor | None]:
        """Return the candidate that logits (vocabulary,) give, and what it was drawn from; no candidate if too unsure."""
        likely = logits.double().softmax(-1) if self.threshold else None
        if likely is not None and float(likely.max()) < self.threshold:
            return None, None
        if self.sampling.greedy:
            return int(logits.argmax()), None
        odds = self.sampling.distribution(logits.cpu())
        return draw(odds, self.generator), odds

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Learn from a step: ``row`` with what it committed, and what was seen."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
