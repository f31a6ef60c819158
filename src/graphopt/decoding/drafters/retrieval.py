"""Candidates from texts: what followed the same tokens in them, and in text generated since."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

from ...ir.errors import UsageError
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter, Seen
from ..followers import Counted, Counting, likely
from ..sampling import Sampling


class Retrieval(Drafter):
    """Proposes a tree of the tokens that most likely follow a row's last tokens, by counts; no model is involved.

    Counts come from what followed n-grams in ``texts``, ideally texts that the program itself wrote
    (:func:`graphopt.answer`), and in all rows since the drafter was created (after REST, arXiv 2311.08252, and
    SuffixDecoding, arXiv 2411.04975; longer n-grams take precedence over shorter ones, as in an n-gram model).

    Args:
        texts: tokens of each text; without any, only generated text is counted.
        nodes: maximum number of candidates.
        order: length of the longest n-gram that is looked up.
        least: minimum probability of a candidate, by the counts along its path.
        own: weight of a count in the rows relative to one in the texts.

    Raises:
        UsageError: a number is out of its range.
    """

    name = "retrieval"

    def __init__(
        self, texts: Iterable[Sequence[int]] = (), nodes: int = 16, order: int = 6, least: float = 0.02,
        own: float = 8.0,
    ):  # fmt: skip
        if nodes < 1 or order < 1 or not 0 < least <= 1 or own <= 0:
            raise UsageError("retrieval: nodes and order must be at least 1, least in (0, 1], own above 0")
        self.room, self.order, self.least = nodes, order, least
        self.written = Counting(order)
        self.sources: list[tuple[Counted | Counting, float]] = [
            (Counted(texts, order), 1.0),
            (self.written, own),
        ]

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Count the prompts; counts from earlier texts are kept."""
        super().begin(decoder, rows, sampling)
        self.known = decoder.embedded or decoder.vocabulary
        for row in rows:
            self.written.add(row, 0)

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Count the committed tokens."""
        self.written.add(row, len(row) - len(seen.path))

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Grow the tree node by node, the likeliest candidate first."""
        heap: list[tuple[float, int, int, int]] = []  # negative probability, order of arrival, parent, token
        arrival = itertools.count()
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        runs: list[list[int]] = []

        def grow(parent: int, run: list[int], chance: float) -> None:
            for token, share in likely(run, self.sources, self.order).items():
                if chance * share >= self.least and token < self.known:
                    heapq.heappush(heap, (-chance * share, next(arrival), parent, token))

        grow(-1, list(row[-self.order :]), 1.0)
        while heap and len(tokens) < self.room:
            minus, _, parent, token = heapq.heappop(heap)
            depth = 1 if parent < 0 else depths[parent] + 1
            before = list(row[-self.order :]) if parent < 0 else runs[parent]
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
            runs.append([*before, token][-self.order :])
            if depth < room:
                grow(len(tokens) - 1, runs[-1], -minus)
        return Draft(tokens, parents).likeliest_first()
