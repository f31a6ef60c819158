"""Communication between the ranks of a sharded program: bytes sent, and time over a link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from ..operators.quantized import chosen_algorithm, payload_bytes, share_bytes
from ..ranks.rank_programs import ranks_of, synchronisations
from ..schema import arguments, operator_name
from ..sizes import expression
from .collectives import ALL_REDUCE, Link, all_gather, all_reduce, one_shot, two_shot
from .resolve import Numbers

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class Sync:
    """One synchronisation of all ranks.

    Attributes:
        node: the collective.
        algorithm: its algorithm.
        message: bytes of the value that is summed or gathered, as sent.
        sent: bytes that each rank sends.
        seconds: over the link; None without one.
    """

    node: str
    algorithm: str
    message: int
    sent: int
    seconds: float | None = None


def communication(
    program: Program,
    link: Link | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    algorithm: str = "best",
) -> list[Sync]:
    """Return the synchronisations of one run, in order; none for a program that is not sharded.

    Args:
        program: sharded.
        link: the interconnect between the ranks.
        sizes: sizes by name; the others as at capture.
        algorithm: of plain all-reduces: ring, tree, double-tree, one-shot, two-shot, star, or the best.
    """
    ranks = ranks_of(program)
    number = Numbers(program, sizes)
    return (
        [_sync(node, ranks, link, number, algorithm) for node in synchronisations(program)] if ranks else []
    )


def _sync(node: fx.Node, ranks: int, link: Link | None, number: Numbers, algorithm: str) -> Sync:
    args = arguments(node)
    value = args["x"].meta["val"]
    shape = [number(expression(s)) if not isinstance(s, int) else s for s in value.shape]
    count = 1
    for size in shape:
        count *= size
    plain = count * value.dtype.itemsize
    name = operator_name(node.target)
    if name == "graphopt.quantized_all_reduce":
        return _quantized(node, count // shape[-1], shape[-1], ranks, link)
    if name in ("graphopt.all_gather", "graphopt.reduce_scatter"):
        total = plain * ranks if name == "graphopt.all_gather" else plain
        seconds = None if link is None else all_gather(total, ranks, link)
        return Sync(node.name, "ring", total, total * (ranks - 1) // ranks, seconds)
    seconds = None
    if link is not None:
        if algorithm == "best":
            algorithm, seconds = all_reduce(plain, ranks, link)
        else:
            seconds = ALL_REDUCE[algorithm](plain, ranks, link)
    return Sync(node.name, algorithm, plain, 2 * (ranks - 1) * plain // ranks, seconds)


def _quantized(node: fx.Node, tokens: int, features: int, ranks: int, link: Link | None) -> Sync:
    args = arguments(node)
    outliers, bits, block = int(args["kept"]), int(args["bits"]), int(args["block"])
    form = chosen_algorithm(args["algorithm"], tokens, features, ranks, bits, int(args["crossover"]))
    if form == "gather":
        message = tokens * payload_bytes(features, outliers, bits, block)
        seconds = None if link is None else one_shot(message, ranks, link)
        return Sync(node.name, form, message, (ranks - 1) * message, seconds)
    largest = share_bytes(features, outliers, bits, block, ranks)
    message = tokens * largest * ranks
    seconds = None if link is None else two_shot(message, ranks, link)
    return Sync(node.name, form, message, 2 * (ranks - 1) * tokens * largest, seconds)


def sent_bytes(program: Program) -> int:
    """Return the number of bytes each rank sends in one run; 0 for a program that is not sharded."""
    return sum(sync.sent for sync in communication(program, None, None))
