"""Fusing linears that read one value into one linear and a split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.facts import FusedProjections, SplitProjections
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import is_operator
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FuseProjections(Pass):
    """Fuse the projections that read the same value into one linear.

    Queries, keys and values of an attention, gate and up of a feed-forward: their matrices are joined along
    the output channels, one product is computed, and the result is split. Fewer, larger products mean fewer
    kernel launches, and the input is read once.

    Layouts: ``plain`` joins whole matrices; ``grouped`` joins, for each key-value head, the queries of its
    group, its key and its value (what tensor-parallel engines slice by head); ``interleaved`` alternates head
    by head (queries, key, value of each head) or row by row (gate, up).
    """

    name = "fuse-projections"
    contract = Exact()
    provides = (FusedProjections,)
    invalidates = (SplitProjections,)

    layout: str = option("plain", help="how rows are ordered", choices=("plain", "grouped", "interleaved"))
    where: str = option("all", help="which blocks", choices=("all", "attention", "ffn"))

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield every block whose projections read one value and have one dtype."""
        for block in program.anatomy.blocks:
            roles = {"attention": ("q", "k", "v"), "ffn": ("gate", "up")}.get(block.kind)
            if roles is None or self.where not in ("all", block.kind):
                continue
            reason = self._reason(program, block, roles)
            if reason:
                yield Refused(block.name, reason, program.source_line(block.term))
            else:
                yield Site(block.name, parts=list(self._members(block, roles)), layout=self.layout), block

    def _members(self, block: Block, roles: tuple[str, ...]) -> dict[str, fx.Node]:
        """Return the projections that read what the last of them reads, by role."""
        if roles == ("q", "k", "v") and block.sizes.get("cross") and "k" in block.parts:
            # keys and values of another stream can still be fused
            roles = ("k", "v")
        return {role: block.parts[role] for role in roles if role in block.parts}

    def _reason(self, program: Program, block: Block, roles: tuple[str, ...]) -> str:
        members = self._members(block, roles)
        nodes = list(members.values())
        if len(nodes) < 2:
            missing = [r for r in roles if r not in block.parts]
            return (
                f"there is no {' and no '.join(missing)} projection beside the others"
                if missing
                else "one projection"
            )
        if len(set(nodes)) < len(nodes):
            return (
                "the projections are fused already"
                if len(set(nodes)) == 1
                else "some projections are fused already"
            )
        if not all(is_operator(node, "aten.linear") for node in nodes):
            return "a projection is no linear"
        if len({node.args[0] for node in nodes}) > 1:
            return "the projections read different values"
        constant = depends_on_weights_alone(program)
        if not all(node.args[1] in constant for node in nodes):
            return "a projection multiplies with something that depends on the input"
        if len({node.meta["val"].dtype for node in nodes}) > 1:
            return "the projections have different types"
        return self._layout_reason(block, members)

    def _layout_reason(self, block: Block, members: dict[str, fx.Node]) -> str:
        if self.layout == "plain":
            return ""
        if block.kind == "ffn":
            if self.layout == "grouped":
                return "a feed-forward has no groups; use plain or interleaved"
            widths = {int(node.meta["val"].shape[-1]) for node in members.values()}
            return "" if len(widths) == 1 else "gate and up have different widths"
        heads, kv_heads = block.sizes["heads"], block.sizes["kv_heads"]
        if not all(isinstance(size, int) for size in (heads, kv_heads)) or set(members) != {"q", "k", "v"}:
            return "heads are not known"
        if self.layout == "interleaved" and heads != kv_heads:
            return f"{heads} heads over {kv_heads} key-value heads do not alternate one by one; use grouped"
        if any(int(node.meta["val"].shape[-1]) % kv_heads for node in members.values()):
            return f"channels do not divide by {kv_heads} key-value heads"
        return ""

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Insert the fused linear before the first of its members."""
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for site, block in self.chosen(program, plan):
            members = [block.parts[role] for role in site["parts"]]
            _fuse(program, block, site["parts"], members, site["layout"], order)


def _fuse(
    program: Program,
    block: Block,
    roles: list[str],
    members: list[fx.Node],
    layout: str,
    order: dict[fx.Node, int],
) -> None:
    groups = 1
    if layout != "plain":
        groups = (
            block.sizes["kv_heads"] if block.kind == "attention" else int(members[0].meta["val"].shape[-1])
        )
    sizes = [int(node.meta["val"].shape[-1]) for node in members]
    x = members[0].args[0]
    weights: list[Any] = [node.args[1] for node in members]
    biases = _biases(members)
    first = min(members, key=lambda n: order[n])
    stem = _common_prefix(program, weights)
    hoist([*weights, *(b for b in biases if b is not None)], first, order)
    with program.edit.before(first):
        weight = _join(program, weights, groups)
        _set_weight_name(weight, f"{stem}{'_'.join(roles)}.weight")
        bias = None
        if any(b is not None for b in biases):
            full = [_bias_or_zero(program, b, w) for b, w in zip(biases, weights, strict=True)]
            bias = _join(program, full, groups)
            _set_weight_name(bias, f"{stem}{'_'.join(roles)}.bias")
        joined = program.edit.call(aten.linear.default, x, weight, bias)
        parts = _split(program, joined, sizes, groups)
    for node, part in zip(members, parts, strict=True):
        program.edit.replace(node, part)


def hoist(values: list[fx.Node], anchor: fx.Node, order: dict[fx.Node, int]) -> None:
    """Move the computation of some weights before ``anchor``; it depends on weights alone, so it can go anywhere.

    Args:
        values: nodes that depend on weights alone.
        anchor: where they are needed.
        order: positions of nodes; nodes not in it were just created, before the anchor.
    """
    moved: dict[fx.Node, None] = {}
    work = list(values)
    while work:
        node = work.pop()
        if node.op == "call_function" and node not in moved and order.get(node, -1) > order[anchor]:
            moved[node] = None
            work.extend(node.all_input_nodes)
    for node in sorted(moved, key=lambda n: order[n]):
        anchor.prepend(node)
        order[node] = order[anchor]


def _join(program: Program, tensors: list[Any], groups: int) -> fx.Node:
    """Return matrices joined by rows: as a whole, or group by group."""
    call = program.edit.call
    if groups == 1:
        return call(aten.cat.default, tensors, 0)
    trailing = [int(s) for s in tensors[0].meta["val"].shape[1:]]
    grouped = [
        call(aten.reshape.default, t, [groups, int(t.meta["val"].shape[0]) // groups, *trailing])
        for t in tensors
    ]
    return call(aten.reshape.default, call(aten.cat.default, grouped, 1), [-1, *trailing])


def _split(program: Program, joined: fx.Node, sizes: list[int], groups: int) -> list[fx.Node]:
    import operator

    call = program.edit.call
    if groups == 1:
        pieces = call(aten.split_with_sizes.default, joined, sizes, -1)
        return [call(operator.getitem, pieces, i) for i in range(len(sizes))]
    lead = program.size_nodes(list(joined.meta["val"].shape[:-1]))
    group_sizes = [size // groups for size in sizes]
    folded = call(aten.reshape.default, joined, [*lead, groups, sum(group_sizes)])
    pieces = call(aten.split_with_sizes.default, folded, group_sizes, -1)
    return [
        call(aten.reshape.default, call(operator.getitem, pieces, i), [*lead, size])
        for i, size in enumerate(sizes)
    ]


def _biases(members: list[fx.Node]) -> list[fx.Node | None]:
    return [node.args[2] if len(node.args) > 2 else None for node in members]  # type: ignore[misc]


def _bias_or_zero(program: Program, bias: fx.Node | None, weight: fx.Node) -> fx.Node:
    if bias is not None:
        return bias
    column = program.edit.call(aten.select.int, weight, 1, 0)
    return program.edit.call(aten.zeros_like.default, column)


def _common_prefix(program: Program, weights: list[fx.Node]) -> str:
    """Return the common prefix of the members' names, up to a dot."""
    names = [program.weights[w.name].name for w in weights if w.name in program.weights]
    if not names:
        return "fused."
    common = os.path.commonprefix(names)  # noqa: RUF071  by character: it is truncated at a dot below
    return common[: common.rfind(".") + 1]


def _set_weight_name(node: fx.Node, name: str) -> None:
    node.meta.setdefault("custom", {}).setdefault("graphopt", {})["weight"] = name
