"""The placement types of :mod:`graphopt.ir.ranks.placement`, and how nodes record them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole value."""

    def __str__(self) -> str:
        return "replicated"


@dataclass(frozen=True)
class Partial:
    """Every rank has a term; the value is their sum."""

    def __str__(self) -> str:
        return "a partial sum"


@dataclass(frozen=True)
class Shard:
    """Every rank has ``length`` of ``total`` entries along ``dim``, beginning at its entry of ``starts``."""

    dim: int
    starts: tuple[int, ...]
    length: int
    total: int

    @property
    def even(self) -> bool:
        """Tell whether the shards, in the order of ranks, cover the value without gap or overlap."""
        return self.starts == tuple(range(0, self.total, self.length)) and (
            self.length * len(self.starts) == self.total
        )

    def at(self, dim: int, factor: int = 1, divisor: int = 1) -> Shard | None:
        """Return the same sharding on another dimension, each entry now ``factor / divisor`` entries; None if inexact."""
        numbers = (*self.starts, self.length, self.total)
        if any(n * factor % divisor for n in numbers):
            return None
        *starts, length, total = (n * factor // divisor for n in numbers)
        return Shard(dim, tuple(starts), length, total)

    def __str__(self) -> str:
        return f"sharded along dimension {self.dim}"


@dataclass(frozen=True)
class Joined:
    """Several values, each sharded on its own, concatenated along ``dim``: fused projections."""

    dim: int
    pieces: tuple[Shard, ...]

    def part(self, start: int, end: int) -> Shard | None:
        """Return the piece that spans ``start`` to ``end``; None if none does."""
        position = 0
        for piece in self.pieces:
            following_position = position + piece.length
            if (start, end) == (position, following_position):
                return piece
            position = following_position
        return None

    def at(self, dim: int) -> Joined:
        """Return the same along another dimension."""
        return Joined(dim, tuple(replace(piece, dim=dim) for piece in self.pieces))

    def __str__(self) -> str:
        return f"{len(self.pieces)} values sharded along dimension {self.dim}, concatenated"


Placement = Replicate | Partial | Shard | Joined
WHOLE, PARTIAL = Replicate(), Partial()


def mark_cut(node: fx.Node, dim: int) -> None:
    """Record the dimension along which a value is sharded, which a shard of one entry does not show."""
    custom = dict(node.meta.get("custom") or {})
    custom["graphopt"] = {**custom.get("graphopt", {}), "cut": dim}
    node.meta["custom"] = custom


def cut_along(node: fx.Node) -> int | None:
    """Return the recorded dimension along which a value is sharded, if there is one."""
    dim = (node.meta.get("custom") or {}).get("graphopt", {}).get("cut")
    return int(dim) if dim is not None else None


class Misplaced(Exception):
    """The placements of a call's operands are incompatible; the message says how."""


def placement_of(value: Any, placed: dict[fx.Node, Placement]) -> Placement:
    """Return the placement of an argument; replicated where it is not a node."""
    return placed[value] if isinstance(value, fx.Node) else WHOLE


def check_whole(placed: dict[fx.Node, Placement], *operands: Any) -> None:
    """Check that these operands are replicated.

    Raises:
        Misplaced: one is sharded or partial.
    """
    for value in operands:
        if isinstance(value, fx.Node) and placed[value] != WHOLE:
            raise Misplaced(f"{value.name} must be replicated here and is {placed[value]}")
