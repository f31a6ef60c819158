"""Bounding how many earlier and later tokens or frames attention sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.errors import PipelineError
from ...ir.export_blockers import block_export
from ...ir.infer import same_size
from ...ir.option import option
from ...ir.program import Program
from ...ir.schema import arguments, is_operator, normal_call
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Refused, Site

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten
NO_FOLDER = "its attention sees a window that the architecture's own code does not apply"


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Pass):
    """Let attention see ``past`` earlier and ``future`` later positions, beside its own.

    What an output depends on adds up over layers: it can be known ``future`` positions later for each layer that sees
    any, and needs the last ``past`` of each. So a bound on latency is best spent in few layers, and one on memory in all.
    With ``future=0`` an encoder becomes causal, and stream-convolutions makes it run in pieces of any length, with the
    keys and values of ``past`` positions as states. A model that was trained to see everything has to be trained again
    within its windows.
    """

    name = "window-attention"
    contract = Approximate()
    paper = "arXiv 2409.09018"
    trial = {"past": 4}  # noqa: RUF012

    past: int | None = option(None, help="earlier positions that are seen; all if left out", low=0)
    future: int | None = option(
        None, help="later positions that are seen, where attention is not causal; all if left out", low=0
    )
    layers: list[int] | None = option(  # noqa: RUF009
        None, help="numbers of the attentions, from 0 in the order of the graph; all if left out"
    )

    def validate(self) -> None:
        """Require a bound."""
        if self.past is None and self.future is None:
            raise PipelineError(f"{self.name}: say what is bounded", hint="past=64, future=0, or both")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise PipelineError(f"{self.name}: layers is empty or lists a number twice")

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield each attention of positions to positions of the same row, or why it has no window."""
        for number, node in enumerate(_attentions(program)):
            if self.layers is not None and number not in self.layers:
                continue
            args = arguments(node)
            if args["visible"] is not None or args["segments"] is not None:
                reason = "what it sees follows from a cache or from segments; bound it before"
                yield Refused(node.name, reason, program.source_line(node))
                continue
            bounds = _narrowed(args, self.past, self.future)
            if bounds is not None:
                past, future = bounds
                yield Site(node.name, number=number, past=past, future=future), node

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the attentions that are asked for."""
        count = sum(1 for _ in _attentions(program))
        missing = [n for n in self.layers or () if not 0 <= n < count]
        if missing:
            raise PipelineError(
                f"{self.name}: there is no attention {missing[0]}", hint=f"the program has {count}, from 0"
            )
        return super().plan(program, context)

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Say how far outputs reach through all windows, where every attention has one."""
        reaches = [_reach(arguments(node)) for node in _attentions(program)]
        for site in plan.sites:
            reaches[site["number"]] = (site["past"], site["future"])
        told = []
        for bound, name in ((0, "earlier"), (1, "later")):
            each = [reach[bound] for reach in reaches]
            if each and None not in each:
                total = sum(n for n in each if n is not None)
                told.append(f"through all attentions an output depends on at most {total:,} {name} positions")
        return told

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Set windows, as causal ones where no later position is seen, and as masks otherwise."""
        masks: dict[tuple[Any, Any], fx.Node] = {}
        for site, node in self.chosen(program, plan):
            past, future = site["past"], site["future"]
            operands = dict(arguments(node))
            with program.edit.before(node):
                if future == 0:
                    operands |= {"causal": True, "window": None if past is None else past + 1}
                elif past == future:
                    operands |= {"window": past + 1}
                else:
                    operands |= {"visible": _band(program, node, past, future, masks)}
                args, kwargs = normal_call(node.target, operands)
                new = program.edit.call(node.target, *args, **kwargs)
            program.edit.replace(node, new)
        if plan.sites:
            block_export(program, NO_FOLDER)


def _attentions(program: Program) -> Iterator[fx.Node]:
    """Yield attentions of the positions of a row to one another, not those to another sequence or within one position."""
    for node in program.graph.nodes:
        if is_operator(node, "graphopt.attention"):
            queries, keys = (arguments(node)[n].meta["val"].shape[2] for n in ("q", "k"))
            if not isinstance(queries, int) and same_size(queries, keys):
                yield node


def _reach(args: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return how many earlier and later positions an attention sees; None for all."""
    window = args["window"]
    seen = None if window is None else window - 1
    return seen, 0 if args["causal"] else seen


def _narrowed(
    args: dict[str, Any], past: int | None, future: int | None
) -> tuple[int | None, int | None] | None:
    """Return the bounds of an attention with those it has already; None if nothing changes."""
    before = _reach(args)
    after = tuple(
        min((n for n in pair if n is not None), default=None)
        for pair in zip(before, (past, future), strict=True)
    )
    return None if after == before else (after[0], after[1])


def _band(
    program: Program,
    node: fx.Node,
    past: int | None,
    future: int | None,
    masks: dict[tuple[Any, Any], fx.Node],
) -> fx.Node:
    """Return a mask (1, 1, queries, keys) that is true within the window; one for all attentions of a kind."""
    if (past, future) not in masks:
        call = program.edit.call
        (length,) = program.size_nodes([arguments(node)["q"].meta["val"].shape[2]])
        device = arguments(node)["q"].meta["val"].device
        index = call(aten.arange.default, length, device=device)
        ahead = call(
            aten.sub.Tensor, call(aten.unsqueeze.default, index, 0), call(aten.unsqueeze.default, index, 1)
        )
        terms = []
        if past is not None:
            terms.append(call(aten.ge.Scalar, ahead, -past))
        if future is not None:
            terms.append(call(aten.le.Scalar, ahead, future))
        seen = terms[0] if len(terms) == 1 else call(aten.bitwise_and.Tensor, *terms)
        masks[past, future] = call(aten.unsqueeze.default, call(aten.unsqueeze.default, seen, 0), 0)
    return masks[past, future]
