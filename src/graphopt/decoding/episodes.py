"""Episodes of a long conversation: its parts by what they are about, and the one that a question belongs to.

After EpiCache (arXiv 2509.17396): segments of a few messages are embedded and clustered; the segments next to the centre
of a cluster are its words, by which a cache of bounded size chooses what it keeps; a question is answered from the cache
whose centre is nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.vq import kmeans2

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.schema import arguments, is_operator

Embed = Callable[[Sequence[Sequence[int]]], torch.Tensor]
"""Turns rows of tokens into vectors (rows, size)."""


@dataclass(frozen=True)
class EpisodeOf:
    """One episode.

    Attributes:
        segments: numbers of its segments, in order.
        centre: (size,), of unit length.
        words: tokens of the segments nearest to the centre, in order.
    """

    segments: tuple[int, ...]
    centre: torch.Tensor
    words: tuple[int, ...]


class TokenMeans:
    """Embeds rows by the program's own token embeddings: their mean, rare tokens counting more, apart from the average.

    Args:
        program: reads tokens.
        tokens: the input of tokens.

    Raises:
        UsageError: the program has no table of token embeddings.
    """

    def __init__(self, program: Program, tokens: str):
        tables = [
            arguments(node)["weight"]
            for node in program.input_nodes[tokens].users
            if is_operator(node, "aten.embedding")
        ]
        if not tables:
            raise UsageError(
                "the program reads no tokens, so their embeddings are unknown", hint="give embed"
            )
        self.table = program.weights[tables[0].name].source.load().float()
        self.seen = torch.ones(self.table.shape[0])

    def count(self, rows: Sequence[Sequence[int]]) -> None:
        """Count in how many rows each token occurs, from the beginning."""
        self.seen = torch.ones(self.table.shape[0])
        for row in rows:
            self.seen[list(set(row))] += 1

    def __call__(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return (rows, size)."""
        means = []
        for row in rows:
            weight = 1 / self.seen[list(row)]
            means.append((self.table[list(row)] * weight[:, None]).sum(0) / weight.sum())
        return torch.stack(means) - self.table.mean(0)


def segments_of(messages: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the tokens of every ``size`` messages that follow one another."""
    return [
        [token for message in messages[first : first + size] for token in message]
        for first in range(0, len(messages), size)
    ]


def clustered(
    segments: Sequence[Sequence[int]], embed: Embed, episodes: int, medoids: int, seed: int
) -> list[EpisodeOf]:
    """Return the episodes of a conversation, at most as many as there are segments.

    Args:
        segments: rows of tokens.
        embed: turns them into vectors.
        episodes: number of clusters (k-means with k-means++).
        medoids: how many segments next to the centre are an episode's words.
        seed: of the clustering.
    """
    vectors = torch.nn.functional.normalize(embed(segments).double(), dim=-1)
    count = min(episodes, len(segments))
    centres, labels = kmeans2(vectors.numpy(), count, minit="++", seed=seed)
    found = []
    for number in range(count):
        members = [i for i, label in enumerate(labels.tolist()) if label == number]
        if not members:
            continue
        centre = torch.nn.functional.normalize(torch.from_numpy(centres[number]), dim=0)
        nearest = sorted(members, key=lambda i: -float(vectors[i] @ centre))[:medoids]
        words = tuple(token for i in sorted(nearest) for token in segments[i])
        found.append(EpisodeOf(tuple(members), centre, words))
    return found


def nearest(episodes: Sequence[EpisodeOf], question: torch.Tensor) -> int:
    """Return the number of the episode whose centre has the largest product with a question's vector."""
    direction = torch.nn.functional.normalize(question.double(), dim=0)
    return max(range(len(episodes)), key=lambda i: float(episodes[i].centre @ direction))
