"""A pass of a third party: swaps the operands of additions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.passes import Exact, Pass, Plan, Site, option


@dataclass(frozen=True, kw_only=True)
class SwapAddends(Pass):
    """Swap the operands of additions of two tensors."""

    name = "swap-addends"
    contract = Exact()

    limit: int = option(100, help="how many additions at most", low=0)

    def plan(self, program, context):
        nodes = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        both = [n for n in nodes if len(n.all_input_nodes) == 2 and not n.kwargs]
        return Plan([Site(n.name) for n in both[: self.limit]])

    def rewrite(self, program, plan):
        nodes = {n.name: n for n in program.graph.nodes}
        for site in plan.sites:
            program.replace(nodes[site.block], lambda a, b: b + a)
