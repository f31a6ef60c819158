"""Forms that compilers for accelerators take, and of which every value can be stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional

from ...ir.errors import PassRefusedError
from ...ir.facts import Legal, QuantizedCache
from ...ir.operators.quantize import HIDDEN
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...ir.rewriting.match import Match
from ...ir.rewriting.pattern import Wild, call
from ...ir.rewriting.rewrite import Rule
from ...ir.rewriting.tracing import Trace
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator, normal_call
from ...targets.faults import misread
from ..framework.base import Pass
from ..framework.plan import Plan, Refused, Site
from .fit_dilation import undilated
from .fit_nested import masked, unfit

if TYPE_CHECKING:
    from ...measure.context import Context

aten, composites = torch.ops.aten, torch.ops.graphopt
MASKS = ("key_mask", "segments", "visible")


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


RULES = {
    "silu": Rule(lambda x: functional.silu(x), lambda x: x * torch.sigmoid(x)),
    "rotary": Rule(call("graphopt.rotary")(Wild("x"), Wild("cos"), Wild("sin")), _turned),
    "bias": Rule(
        call("linear")(Wild("x"), Wild("weight"), Wild("bias", lambda bias: bias is not None)),
        lambda x, weight, bias: functional.linear(x, weight) + bias,
        where=lambda match: match.roots[0].meta["val"].dim() != 2,
    ),
}
"""What is one operator, and becomes several."""


@dataclass(frozen=True, kw_only=True)
class FitTarget(Pass):
    """Masks of attention become numbers that are added to scores; SiLU, rotation and biases become operators of their own.

    What a device computes is then one operator for each value, so that quantize can say how each of them is stored; masks
    depend on integers alone, so that lowering leaves them, with positions, to the host. ``hidden`` takes the place of minus
    infinity: a row in which no key is seen gets the mean of all values, where it got zeros. Unless it is given, quantize
    brings it as near to the scores as hides: a range of few bits has to hold it.
    """

    name = "fit-target"
    provides = (Legal,)
    excludes = (Legal, QuantizedCache)

    hidden: float = option(HIDDEN, help="what is added to the score of a key that is not seen", high=-20.0)

    def plan(self, program: Program, context: Context) -> Plan:
        """Find masks, SiLUs, biases, stacks, feed-forwards of several widths, and convolutions computed wrongly."""
        plan = Plan()
        constant = depends_on_weights_alone(program)
        candidates = {node: name for name, rule in RULES.items() for node in rule.candidates(program)}
        for node in program.nodes:
            if is_operator(node, "graphopt.attention") and _masked(node):
                plan.sites.append(Site(node.name, what="mask"))
            elif is_operator(node, "graphopt.cache_visible") and isinstance(_slots(node), int):
                plan.sites.append(Site(node.name, what="slots"))
            elif is_operator(node, "graphopt.nested_ffn"):
                reason = unfit(program, node)
                if reason:
                    plan.refused.append(Refused(node.name, reason, program.source_line(node)))
                else:
                    plan.sites.append(Site(node.name, what="widths"))
            elif is_operator(node, "graphopt.cache_store") and isinstance(node.meta["val"].shape[2], int):
                plan.sites.append(Site(node.name, what="store"))
            elif misread(node):
                plan.sites.append(Site(node.name, what="dilation"))
            elif is_operator(node, "aten.stack") and node not in constant:
                plan.sites.append(Site(node.name, what="stack"))
            elif is_operator(node, "graphopt.rms_norm") and arguments(node)["weight"] is None:
                plan.sites.append(Site(node.name, what="norm"))
            elif node in candidates:
                name = candidates[node]
                if isinstance(RULES[name].at(program, node), Match):
                    plan.sites.append(Site(node.name, what=name))
        if not any(site["what"] == "mask" for site in plan.sites):
            refuse_set(self.name, self, ("hidden",), "no attention of this program hides a key")
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Replace each."""
        nodes = {n.name: n for n in program.nodes}
        masks: dict[Any, fx.Node] = {}
        traces: dict[str, dict[Any, Trace]] = {name: {} for name in RULES}
        for site in plan.sites:
            node, name = nodes[site.block], site["what"]
            if name in RULES:
                match = RULES[name].at(program, node)
                if isinstance(match, str) or isinstance(RULES[name].apply(program, match, traces[name]), str):
                    raise PassRefusedError(f"{node.name} is not what the plan says: {name}", node=node.name)
                continue
            operands = dict(arguments(node))
            emit = program.edit.call
            with program.edit.before(node):
                if site["what"] == "dilation":
                    replacement = undilated(program, node)
                elif site["what"] == "widths":
                    replacement = masked(program, node)
                elif site["what"] == "store":
                    replacement = _stored(program, operands, masks)
                elif site["what"] == "stack":
                    dim = operands["dim"] % node.meta["val"].dim()
                    apart = [emit(aten.unsqueeze.default, part, dim) for part in operands["tensors"]]
                    replacement = emit(aten.cat.default, apart, dim)
                elif site["what"] == "slots":
                    # a cache is read for its length alone, which is known
                    operands["cache"] = emit(aten.zeros.default, [1, 1, _slots(node), 1])
                    args, kwargs = normal_call(node.target, operands)
                    replacement = emit(node.target, *args, **kwargs)
                elif site["what"] == "norm":
                    # the fused operator of ONNX has a weight
                    size, dtype = int(node.meta["val"].shape[-1]), node.meta["val"].dtype
                    operands["weight"] = program.edit.add_weight(
                        f"{node.name}.ones", torch.ones(size, dtype=dtype), kind="buffer"
                    )
                    args, kwargs = normal_call(node.target, operands)
                    replacement = emit(node.target, *args, **kwargs)
                else:
                    replacement = self._attention(program, node, operands, masks)
            program.edit.replace(node, replacement)

    def _attention(
        self, program: Program, node: fx.Node, operands: dict[str, Any], masks: dict[Any, fx.Node]
    ) -> fx.Node:
        call = program.edit.call
        queries, keys = operands["q"].meta["val"].shape[2], operands["k"].meta["val"].shape[2]
        key = (*(operands[n] for n in MASKS), str(queries), str(keys), operands["causal"], operands["window"])
        if key not in masks:
            sizes = program.size_nodes([queries, keys])
            masks[key] = call(
                composites.additive_mask.default, *(operands[n] for n in MASKS), *sizes, causal=operands["causal"],
                window=operands["window"], hidden=self.hidden,
            )  # fmt: skip
        bias = masks[key]
        if operands["bias"] is not None:
            bias = call(aten.add.Tensor, operands["bias"], bias)
        operands.update(key_mask=None, segments=None, visible=None, bias=bias, causal=False, window=None)
        args, kwargs = normal_call(node.target, operands)
        return call(node.target, *args, **kwargs)


def _stored(program: Program, operands: dict[str, Any], tables: dict[Any, fx.Node]) -> fx.Node:
    """Return a cache with new values in their slots by a product with ones and zeros, which the host makes of integers."""
    call, cache, slots = program.edit.call, operands["cache"], operands["slots"]
    capacity, dtype = int(cache.meta["val"].shape[2]), cache.meta["val"].dtype
    key = (slots, capacity, dtype)
    if key not in tables:
        number = call(aten.unsqueeze.default, call(aten.arange.default, capacity), 1)
        wide = call(aten.unsqueeze.default, call(aten.unsqueeze.default, slots, 1), 1)
        tables[key] = call(aten.to.dtype, call(aten.eq.Tensor, wide, number), dtype)
        tables["kept", *key] = call(aten.rsub.Scalar, call(aten.sum.dim_IntList, tables[key], [-1], True), 1)
    values = operands["values"]
    if values.meta["val"].dtype != dtype:
        values = call(aten.to.dtype, values, dtype)
    kept = call(aten.mul.Tensor, cache, tables["kept", *key])
    return call(aten.add.Tensor, kept, call(aten.matmul.default, tables[key], values))


def _slots(node: fx.Node) -> Any:
    cache = arguments(node)["cache"]
    return None if is_operator(cache, "aten.zeros") else cache.meta["val"].shape[2]


def _masked(node: fx.Node) -> bool:
    operands = arguments(node)
    return operands["causal"] or operands["window"] is not None or any(operands[n] is not None for n in MASKS)
