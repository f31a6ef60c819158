"""Candidates from heads that predict several tokens (Medusa, arXiv 2401.10774)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from ...ir.cost import cost
from ...ir.errors import UsageError
from ...ir.facts import KVCache
from ...ir.facts import MultiTokenHeads as Attached
from ...ir.program import Program
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter, Seen
from ..sampling import Sampling

OUTPUT = "multi_token_logits"
TOKENS = f"{OUTPUT}_tokens"
"""The output that take-top-k makes of the logits: the likeliest tokens, best first."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
"""Numbers of candidates that are tried."""

ASSUMED = (0.55, 0.15, 0.07, 0.04, 0.03, 0.02)
"""Assumed share of correct predictions by rank if nothing was measured; halved with each depth."""


class MultiTokenHeads(Drafter):
    """Proposes a tree of the tokens that the heads consider likely after the last accepted token.

    The tree consists of the ``nodes`` most promising paths of ranks, by the measured accuracy of each head and rank; a
    candidate's parent is always included. Nothing is padded: a row has as many candidates as its tree.

    Args:
        nodes: number of candidates; None lets the cost model choose the best number for ``device``.
        accuracy: (heads, ranks), how often each head's prediction of each rank is correct; by default, the
            program's measured accuracy, or an assumed one.
        device: the device for which the number of candidates is chosen; see ``graphopt devices``.

    Raises:
        UsageError: fewer than one node, or no number and no device.
    """

    name = "multi-token-heads"
    outputs = (OUTPUT,)

    def __init__(
        self, nodes: int | None = 8, accuracy: Sequence[Sequence[float]] | None = None, device: str | None = None
    ):  # fmt: skip
        if nodes is not None and nodes < 1:
            raise UsageError("multi-token-heads: nodes must be at least 1")
        if nodes is None and device is None:
            raise UsageError("multi-token-heads: say how many nodes, or for which device")
        self.nodes, self.accuracy, self.on = nodes, accuracy, device
        self.room = max(SIZES) if nodes is None else nodes

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Build the tree.

        Raises:
            UsageError: the program has no heads.
        """
        super().begin(decoder, rows, sampling)
        attached = decoder.program.facts.get(Attached)
        self.taken = TOKENS in decoder.program.outputs
        if attached is None or not (self.taken or OUTPUT in decoder.program.outputs):
            raise UsageError(
                "this program has no multi-token heads", hint="attach-multi-token-heads adds them"
            )
        heads = attached.heads
        measured = self.accuracy or attached.accuracy
        if measured is None:
            measured = [[a / 2**depth for a in ASSUMED] for depth in range(heads)]
        nodes = self.nodes or best_size(
            decoder.program, measured[:heads], str(self.on), len(rows), decoder.capacity
        )
        self.paths = best_paths(measured[:heads], nodes)
        self.ranks = 1 + max(path[-1] for path in self.paths)
        self.outputs = (TOKENS if self.taken else OUTPUT,)
        if self.taken:
            available = int(decoder.program.outputs[TOKENS].meta["val"].shape[-1])
            if available < self.ranks:
                raise UsageError(
                    f"the tree looks at {self.ranks} tokens of a head, the program gives {available}",
                    hint="take-top-k{k=...} says how many, nodes= how large the tree is",
                )
        self.next: list[torch.Tensor | None] = [None] * len(rows)

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Keep the heads' predictions at the last accepted token."""
        predictions = seen.outputs[self.outputs[0]][seen.path[-1]]
        self.next[number] = (
            predictions if self.taken else predictions.topk(self.ranks, dim=-1).indices
        ).cpu()

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        """Fill the tree."""
        predictions = self.next[number]
        if predictions is None:
            return Draft()
        indices = {path: node for node, path in enumerate(self.paths)}
        tokens = [int(predictions[len(path) - 1, path[-1]]) for path in self.paths]
        return Draft(tokens, [indices.get(path[:-1], -1) for path in self.paths])

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        self.next = [self.next[row] for row in rows]


def best_paths(accuracy: Sequence[Sequence[float]], nodes: int) -> list[tuple[int, ...]]:
    """Return the paths of ranks that are most likely to be correct, parents before children.

    The probability of a path is taken as the product over its steps. A path is never likelier than its parent, nor than
    the same path with a better last rank, so extending the best path so far finds the best paths.

    Args:
        accuracy: (heads, ranks).
        nodes: number of paths.
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(accuracy[0][0]), (0,))]
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < nodes:
        chance, path = heapq.heappop(heap)
        if chance == 0.0:
            break
        paths.append(path)
        depth, rank = len(path) - 1, path[-1]
        if rank + 1 < len(accuracy[depth]) and accuracy[depth][rank]:
            ratio = min(1.0, accuracy[depth][rank + 1] / accuracy[depth][rank])
            heapq.heappush(heap, (chance * ratio, (*path[:-1], rank + 1)))
        if depth + 1 < len(accuracy):
            heapq.heappush(heap, (chance * min(1.0, float(accuracy[depth + 1][0])), (*path, 0)))
    return paths or [(0,)]


def best_size(
    program: Program, accuracy: Sequence[Sequence[float]], device: str, batch: int, context: int
) -> int:
    """Return the number of candidates that gives the most tokens per second, by measured accuracy and the cost model.

    Args:
        program: with a cache and heads.
        accuracy: (heads, ranks).
        device: see ``graphopt devices``.
        batch: number of rows computed together.
        context: number of cache slots that are read.
    """
    shape = program.signature.inputs[program.facts[KVCache].tokens].shape

    def seconds(tokens: int) -> float:
        sizes = {str(shape[0]): batch, str(shape[1]): tokens, "capacity": context}
        program_sizes = {n: s for n, s in sizes.items() if n in program.signature.sizes}
        estimate = cost(program, program_sizes, device).time_seconds
        assert estimate is not None
        return estimate

    rates = {n: expected_tokens(accuracy, best_paths(accuracy, n)) / seconds(n + 1) for n in SIZES}
    return max(rates, key=lambda n: rates[n])


def expected_tokens(accuracy: Sequence[Sequence[float]], paths: Sequence[tuple[int, ...]]) -> float:
    """Return the average number of tokens a step commits, including the program's own, for the given accuracy."""
    total = 1.0
    for path in paths:
        chance = 1.0
        for depth, rank in enumerate(path):
            chance *= float(accuracy[depth][rank])
        total += chance
    return total
