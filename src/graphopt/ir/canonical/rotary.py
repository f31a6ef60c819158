"""Recognition of rotary position embeddings, in halves (Llama) and in pairs (GPT-J)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_size
from ..rewriting.cleanup import replace_or_erase
from ..rewriting.match import Match, find
from ..rewriting.pattern import Either, Listed, Wild, call

if TYPE_CHECKING:
    from ..program import Program


def _slice(x: Any, start: Any, end: Any, step: Any = 1) -> Any:
    return call("slice")(x, Wild("dim"), start, end, step)


def _halves(x: Any) -> Either:
    sliced = call("cat")(
        Listed((call("neg")(_slice(x, Wild("half"), Wild("end"))), _slice(x, Wild("zero"), Wild("half")))),
        Wild("axis"),
    )
    parts = call("split_with_sizes")(x, Wild("sizes"), Wild("dim"))
    split = call("cat")(
        Listed((call("neg")(call("getitem")(parts, 1)), call("getitem")(parts, 0))), Wild("axis")
    )
    return Either((sliced, split))


def _pairs(x: Any) -> Any:
    odd = _slice(x, Wild("zero1"), Wild("end1"), 2)
    even = _slice(x, Wild("zero0"), Wild("end0"), 2)
    stacked = call("stack")(Listed((call("neg")(odd), even)), Wild("axis"))
    return Either((call("reshape")(stacked, Wild("shape")), call("flatten", loose=True)(stacked)))


def _pattern(rotated: Any) -> Any:
    x = Wild("x")
    straight = call("mul")(x, Wild("cos"))
    turned = call("mul")(rotated(x), Wild("sin"))
    return call("add")(straight, turned)


def _half_tables(interleaved: bool) -> Either:
    """Return the pattern with tables of half the size: ``x1 * cos - x2 * sin`` and ``x2 * cos + x1 * sin``, joined."""
    x = Wild("x")
    if interleaved:
        even = _slice(x, Wild("zero0"), Wild("end0"), 2)
        odd = _slice(x, Wild("zero1"), Wild("end1"), 2)
        stacked = call("stack")(_rotate_pair(even, odd), Wild("axis"))
        return Either((call("reshape")(stacked, Wild("shape")), call("flatten", loose=True)(stacked)))
    first, second = _slice(x, Wild("zero"), Wild("half")), _slice(x, Wild("half"), Wild("end"))
    parts = call("split_with_sizes")(x, Wild("sizes"), Wild("dim"))
    split = call("getitem")(parts, 0), call("getitem")(parts, 1)
    return Either(tuple(call("cat")(_rotate_pair(*pair), Wild("axis")) for pair in ((first, second), split)))


def _rotate_pair(first: Any, second: Any) -> Listed:
    cos, sin, mul = Wild("cos"), Wild("sin"), call("mul")
    straight = call("sub")(mul(first, cos), mul(second, sin))
    return Listed((straight, call("add")(mul(second, cos), mul(first, sin))))


def _widened(program: Program, match: Match, interleaved: bool) -> bool:
    """Expand tables with one value per pair to one per channel; return False if they have another size."""
    tables = [match["cos"], match["sin"]]
    size = match["x"].meta["val"].shape[-1]
    if any(not t.meta["val"].dim() or not same_size(t.meta["val"].shape[-1], size // 2) for t in tables):
        return False
    with program.edit.before(match.roots[0]):
        for name, table in zip(("cos", "sin"), tables, strict=True):
            if interleaved:
                wide = program.edit.call(torch.ops.aten.repeat_interleave.self_int, table, 2, -1)
            else:
                wide = program.edit.call(torch.ops.aten.cat.default, [table, table], -1)
            match.captured[name] = wide
    return True


def raise_rotary(program: Program) -> None:
    """Replace rotations of channel pairs by ``graphopt.rotary``."""
    for interleaved in (False, True):
        for match in find(program.graph, _half_tables(interleaved)):
            if _is_rotation(match, interleaved) and _widened(program, match, interleaved):
                _raise(program, match, interleaved)
    for interleaved, rotated in ((False, _halves), (True, _pairs)):
        for match in find(program.graph, _pattern(rotated)):
            if _is_rotation(match, interleaved):
                _raise(program, match, interleaved)


def _is_rotation(match: Match, interleaved: bool) -> bool:
    x = match["x"]
    if (
        not isinstance(x, fx.Node)
        or not isinstance(match["cos"], fx.Node)
        or not isinstance(match["sin"], fx.Node)
    ):
        return False
    rank, size = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if not isinstance(size, int) or size % 2:
        return False
    if match.get("dim", -1) % rank != rank - 1:
        return False
    if interleaved:
        starts = (match["zero1"], match["zero0"])
        ends = (match["end1"], match["end0"])
        return starts == (1, 0) and all(e is None or e >= size for e in ends) and match["axis"] in (-1, rank)
    if match["axis"] % rank != rank - 1:
        return False
    if "sizes" in match.captured:
        return list(match["sizes"]) == [size // 2, size // 2]
    return (
        match["half"] == size // 2
        and match["zero"] in (0, None)
        and (match["end"] is None or match["end"] >= size)
    )


def _raise(program: Program, match: Match, interleaved: bool) -> None:
    node = match.roots[0]
    with program.edit.before(node):
        new = program.edit.call(
            torch.ops.graphopt.rotary.default, match["x"], match["cos"], match["sin"], interleaved=interleaved
        )
    replace_or_erase(program, node, new)
