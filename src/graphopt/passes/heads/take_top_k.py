"""Outputs of which only the largest entries are needed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.errors import PassRefusedError
from ...ir.option import option
from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from ..framework.base import Pass
from ..framework.contracts import NewFunction
from ..framework.plan import Plan, Refused, Site

if TYPE_CHECKING:
    from ...measure.context import Context

aten, composites = torch.ops.aten, torch.ops.graphopt


@dataclass(frozen=True, kw_only=True)
class TakeTopK(Pass):
    """Replace an output by its k largest entries and their indices.

    For heads that propose tokens: a tree of candidates needs the ten most likely of each head, while 128,000 logits
    for each head and token mostly take memory. The output ``NAME`` becomes ``NAME_values`` and ``NAME_tokens``, both
    with k entries in the last dimension. If NAME is a linear, or several stacked, the linear and the selection become
    one operator, with a Triton kernel that never writes the logits.
    """

    name = "take-top-k"
    contract = NewFunction()
    together = True
    trial = {"output": "multi_token_logits"}  # noqa: RUF012

    k: int = option(10, help="how many entries", low=1, high=1024)
    output: str = option("multi_token_logits", help="which output")

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the output and the linears that compute it."""
        plan = Plan()
        if self.output not in program.outputs:
            names = ", ".join(program.outputs)
            plan.refused.append(Refused(self.output, f"the program has no such output; it has {names}", ""))
            return plan
        if "dict" not in program.signature.outputs:
            plan.refused.append(Refused(self.output, "the program's outputs have no names", ""))
            return plan
        node = program.outputs[self.output]
        value = node.meta["val"]
        if not value.is_floating_point() or value.dim() == 0:
            plan.refused.append(Refused(self.output, "it is not a floating-point tensor", ""))
            return plan
        size = value.shape[-1]
        if not isinstance(size, int) or size < self.k:
            raise PassRefusedError(f"{self.name}: {self.output} has {size} entries, fewer than k={self.k}")
        plan.sites.append(Site(self.output, k=self.k, linears=len(_linears(node))))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Replace the output by the two new ones."""
        call = program.edit.call
        for site in plan.sites:
            node, k = program.outputs[site.block], int(site["k"])
            linears = _linears(node)
            pairs: list[tuple[fx.Node, fx.Node]] = []
            with program.edit.after(node):
                for linear in linears:
                    args = arguments(linear)
                    both = call(
                        composites.linear_top_k.default, args["input"], args["weight"], args["bias"], k
                    )
                    pairs.append((call(operator.getitem, both, 0), call(operator.getitem, both, 1)))
                if not linears:
                    both = call(aten.topk.default, node, k)
                    pairs.append((call(operator.getitem, both, 0), call(operator.getitem, both, 1)))
                values, tokens = (
                    pairs[0] if node in linears or not linears else _stacked(program, node, pairs)
                )
            _replace_output(
                program, site.block, {f"{site.block}_values": values, f"{site.block}_tokens": tokens}
            )


def _linears(node: fx.Node) -> list[fx.Node]:
    """Return the linears whose stacked results are an output, in order; empty if it is something else."""
    if is_operator(node, "aten.linear"):
        return [node]
    if not is_operator(node, "aten.stack"):
        return []
    operands = list(arguments(node)["tensors"])
    dim = int(arguments(node)["dim"])
    inner = dim % node.meta["val"].dim() != node.meta["val"].dim() - 1
    return operands if inner and all(is_operator(operand, "aten.linear") for operand in operands) else []


def _stacked(
    program: Program, node: fx.Node, pairs: list[tuple[fx.Node, fx.Node]]
) -> tuple[fx.Node, fx.Node]:
    dim = int(arguments(node)["dim"])
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    call = program.edit.call
    return call(aten.stack.default, first, dim), call(aten.stack.default, second, dim)


def _replace_output(program: Program, name: str, by: dict[str, fx.Node]) -> None:
    outputs = program.outputs
    items = program.signature.outputs["dict"]
    after = {}
    for key, structure in items.items():
        if structure == {"leaf": name}:
            after.update({new: {"leaf": new} for new in by})
        else:
            after[key] = structure
    values: list[fx.Node] = []
    for key, value in outputs.items():
        values.extend(by.values() if key == name else [value])
    program.signature.outputs["dict"] = after
    program.signature.outputs["class"] = None
    program.edit.set_outputs(values)
    program.edit.erase_dead([outputs[name]])
