"""Operators that are computed together by one kernel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.facts import FusedKernels
from ...ir.infer import same_shape
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site

aten, composites = torch.ops.aten, torch.ops.graphopt


@dataclass(frozen=True, kw_only=True)
class FuseKernels(Pass):
    """Make one operator of an addition to the stream and the norm that reads it, and one of an activation and its gate.

    Both are limited by memory: apart, the sum is written and read again, and so is what the activation gives. There is a
    Triton kernel for each; elsewhere they compute what they stand for. Blocks are found by additions to the stream, which
    this hides: it comes last.
    """

    name = "fuse-kernels"
    contract = Exact()
    provides = (FusedKernels,)
    excludes = (FusedKernels,)

    where: str = option("all", help="what is joined", choices=("all", "norms", "gates"))

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield norms with the sums that they read, and products of an activation with its gate."""
        order = {node: number for number, node in enumerate(program.nodes)}
        constant = depends_on_weights_alone(program)
        taken: set[fx.Node] = set()
        for node in program.nodes:
            if self.where != "gates" and is_operator(node, "graphopt.rms_norm"):
                total = arguments(node)["x"]
                if not is_operator(total, "aten.add"):
                    continue
                reason = _apart(node, total, order, constant, taken)
                if reason:
                    yield Refused(node.name, reason, program.source_line(node))
                    continue
                taken.add(total)
                yield Site(node.name, what="norm", sum=total.name), (node, total)
            elif self.where != "norms" and is_operator(node, "aten.mul"):
                gated = _gate(node)
                if isinstance(gated, str):
                    if gated:
                        yield Refused(node.name, gated, program.source_line(node))
                    continue
                yield Site(node.name, what="gate", activation=gated[2]), (node, gated)

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Put one operator in the place of two."""
        call, now = program.edit.call, program.edit.now
        for site, (node, other) in self.chosen(program, plan):
            if site["what"] == "gate":
                gate, up, activation = other
                with program.edit.before(node):
                    product = call(
                        composites.gated_product.default, now(gate), now(up), activation=activation
                    )
                program.edit.replace(node, product)
                continue
            total = now(other)
            sides, norm = arguments(total), arguments(node)
            if norm["weight"] is not None:
                program.edit.hoist(norm["weight"], total)
            with program.edit.before(total):
                both = call(
                    composites.add_rms_norm.default, sides["self"], sides["other"], norm["weight"], norm["eps"],
                    float32=norm["float32"], weight_before_cast=norm["weight_before_cast"],
                )  # fmt: skip
                summed, normed = call(operator.getitem, both, 0), call(operator.getitem, both, 1)
            others = set(total.users) - {node}
            program.edit.replace(node, normed)
            # a sum that its norm alone reads has left with it, as the last one of a decoder does
            if others:
                program.edit.replace(total, summed)


def _apart(
    norm: fx.Node, total: fx.Node, order: dict[fx.Node, int], constant: set[fx.Node], taken: set[fx.Node]
) -> str:
    """Return why a sum and its norm stay apart, or nothing."""
    operands = arguments(total)
    sides = [operands["self"], operands["other"]]
    if not all(isinstance(side, fx.Node) for side in sides) or operands.get("alpha", 1) != 1:
        return "what is added is a number, or scaled"
    values = [side.meta["val"] for side in sides]
    if not same_shape(values[0].shape, values[1].shape) or values[0].dtype != values[1].dtype:
        return "what is added has another shape or type"
    if total in taken:
        return "another norm of the same sum is computed with it"
    weight = arguments(norm)["weight"]
    if isinstance(weight, fx.Node) and weight not in constant and order[weight] > order[total]:
        return "the norm's weight is computed after the sum"
    return ""


def _gate(product: fx.Node) -> tuple[fx.Node, fx.Node, str] | str:
    """Return gate, up and activation of a product; why not, or nothing where there is no activation."""
    operands = arguments(product)
    sides = [operands["self"], operands["other"]]
    if not all(isinstance(side, fx.Node) for side in sides):
        return ""
    for active, up in (sides, sides[::-1]):
        name = _activation(active)
        if name is None:
            continue
        gate: Any = arguments(active)["self"]
        if (
            not same_shape(gate.meta["val"].shape, up.meta["val"].shape)
            or gate.meta["val"].dtype != up.meta["val"].dtype
        ):
            return "gate and up have other shapes or types"
        if len(active.users) > 1:
            return "the activation is read elsewhere too"
        if gate is up:
            return ""
        return gate, up, name
    return ""


def _activation(node: fx.Node) -> str | None:
    if is_operator(node, "aten.silu"):
        return "silu"
    if is_operator(node, "aten.relu"):
        return "relu"
    if is_operator(node, "aten.gelu"):
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"
    return None
