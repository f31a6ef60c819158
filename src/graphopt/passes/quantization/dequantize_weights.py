"""Weights that are kept in few bits made plain, with the same values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...ir.option import option
from ...ir.program import Program
from ...ir.quantised.stored import Plain, is_quantised, stored_bytes
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site


@dataclass(frozen=True, kw_only=True)
class DequantizeWeights(Pass):
    """Keep the values of quantised weights as plain numbers, for passes and exits that need them plain.

    Nothing is computed otherwise: programs always run with the dequantised values. What is written then takes the space
    of plain weights.
    """

    name = "dequantize-weights"
    contract = Exact()

    skip: tuple[str, ...] = option((), help="weights to leave, by name or part of a name")

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield each weight that is kept as codes."""
        for node in program.weight_nodes:
            weight = program.weights[node.name]
            if not is_quantised(weight.source):
                continue
            if any(part in name for part in self.skip for name in weight.all_names):
                yield Refused(node.name, "left alone by the option skip")
            else:
                yield Site(node.name), node

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return how many bytes the weights took and take."""
        weights = [program.weights[s.block] for s in plan.sites if s.block in program.weights]
        before = sum(stored_bytes(w.source) for w in weights)
        after = sum(w.bytes for w in weights)
        return (
            [f"{len(weights)} weights take {before / 1e6:.1f} MB before and {after / 1e6:.1f} MB after"]
            if weights
            else []
        )

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Let the planned weights forget their codes."""
        for _, node in self.chosen(program, plan):
            weight = program.weights[node.name]
            program.weights[node.name] = weight.with_source(Plain(weight.source))
        program.changed()
