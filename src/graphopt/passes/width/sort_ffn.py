"""Hidden channels in the order of their importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...ir.anatomy import Block
from ...ir.option import option
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.kept_tensors import keep, kept
from ..framework.plan import Plan, Refused, Site
from ..shared.fused_projections import split_all
from .scores import SCORES, hidden_scores
from .taking import refusal, take_channels, tied

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class SortFfn(Pass):
    """Order the hidden channels of feed-forwards by importance, the most important first.

    What nested experts (DynaMoE, arXiv 2502.12325; Flextron, arXiv 2406.10260) begin with: a prefix of the channels is
    then the best small feed-forward of its width. The function stays the same. Layers that share weights get one order,
    by the sum of their scores.
    """

    name = "sort-ffn"
    contract = Exact()
    paper = "arXiv 2502.12325, 2406.10260"

    score: str = option(
        "activation", help="what tells how much a channel matters", source="paper", choices=SCORES
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Score the channels of every feed-forward."""
        return plan_orders(program, context, self.score)

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Put channels in the planned order."""
        take_planned(program, plan)


def plan_orders(program: Program, context: Context, score: str, widths: dict[str, int] | None = None) -> Plan:
    """Return a plan that takes the channels of highest score, in the order of their scores or of the graph.

    Args:
        program: whose feed-forwards.
        context: data.
        score: one of ``SCORES``.
        widths: how many channels each block keeps, in the order that they have; None sorts all.
    """
    plan = Plan()
    trial = program.copy()
    split_all(trial)
    able: list[Block] = []
    for block in trial.anatomy.ffn:
        reason = refusal(trial, block)
        if reason:
            plan.refused.append(Refused(block.name, reason, trial.source_line(block.term)))
        else:
            able.append(block)
    if not able:
        return plan
    scores = hidden_scores(trial, context, able, score)
    orders: dict[str, torch.Tensor] = {}
    for group in tied(able):
        total = torch.stack([scores[b.name].double() for b in group]).sum(0)
        order = total.argsort(descending=True, stable=True)
        if widths is not None:
            order = order[: widths[group[0].name]].sort().values
        for block in group:
            orders[block.name] = order
    where = keep(orders, context.work_dir, "channels")
    for group in tied(able):
        try:
            take_channels(trial, group, orders)
        except ValueError as problem:
            plan.refused += [
                Refused(b.name, f"its channels cannot be followed to weights: {problem}") for b in group
            ]
            continue
        for block in group:
            kept_count = len(orders[block.name])
            plan.sites.append(
                Site(block.name, width=int(block.sizes["width"]), kept=kept_count, channels=where)
            )
    return plan


def take_planned(program: Program, plan: Plan) -> None:
    """Take the channels that a plan says."""
    split_all(program, {site.block for site in plan.sites})
    chosen = {site.block: kept(str(site["channels"]))[site.block] for site in plan.sites}
    take_channels(program, [b for b in program.anatomy.ffn if b.name in chosen], chosen)
