"""Sorting hidden channels by importance."""

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
from ..framework.rollback import may_be_left_out
from ..shared.fused_projections import fused_linears, split_all
from .scores import SCORES, hidden_scores
from .taking import refusal, take_channels, tied

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class SortFfn(Pass):
    """Order the hidden channels of feed-forwards by importance, the most important first.

    Nested experts (DynaMoE, arXiv 2502.12325; Flextron, arXiv 2406.10260) start from this: a prefix of the channels is
    then the best small feed-forward of its width. The function does not change. Layers that share weights get one
    order, by the sum of their scores.
    """

    name = "sort-ffn"
    contract = Exact()
    paper = "arXiv 2502.12325, 2406.10260"

    score: str = option("activation", help="score of a channel's importance", source="paper", choices=SCORES)

    def plan(self, program: Program, context: Context) -> Plan:
        """Score the channels of every feed-forward."""
        scored = score_channels(self, program, context, self.score)
        return carried_out(self, program, plan_orders(scored, context))

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Put channels in the planned order."""
        take_planned(program, plan)


@dataclass
class Scored:
    """Feed-forwards whose hidden channels can be selected, their scores by block name, and refusals of the others.

    ``program`` is the one that the blocks belong to, with no projections fused inside them.
    """

    program: Program
    blocks: list[Block]
    scores: dict[str, torch.Tensor]
    refused: list[Refused]


def apart(step: Pass, program: Program) -> Program:
    """Return a program whose feed-forwards have no fused projections: itself if there are none, else a copy."""
    inside = {node for block in program.anatomy.ffn for node in block.nodes}
    fused = (node for node, parts in fused_linears(program) if not isinstance(parts, str) and len(parts) > 1)
    if inside.isdisjoint(fused):
        return program
    copy = step.copied(program)
    split_all(copy, {block.name for block in program.anatomy.ffn})
    return copy


def score_channels(step: Pass, program: Program, context: Context, score: str | None) -> Scored:
    """Return scores of the hidden channels of every feed-forward.

    Args:
        step: the pass that needs the scores.
        program: the program with the feed-forwards.
        context: calibration data.
        score: one of ``SCORES``; None for no scores.
    """
    unfused = apart(step, program)
    scorable: list[Block] = []
    refused: list[Refused] = []
    for block in unfused.anatomy.ffn:
        reason = refusal(block)
        if reason:
            refused.append(Refused(block.name, reason, unfused.source_line(block.term)))
        else:
            scorable.append(block)
    scores = hidden_scores(unfused, context, scorable, score) if scorable and score is not None else {}
    return Scored(unfused, scorable, scores, refused)


def plan_orders(scored: Scored, context: Context, widths: dict[str, int] | None = None) -> Plan:
    """Return a plan that selects the channels of highest score, sorted by score or in their present order.

    Args:
        scored: feed-forwards with scores.
        context: its work directory stores the orders.
        widths: how many channels each block keeps, in their present order; None sorts all by score.
    """
    plan = Plan(refused=list(scored.refused))
    if not scored.blocks:
        return plan
    orders: dict[str, torch.Tensor] = {}
    for group in tied(scored.blocks):
        total = torch.stack([scored.scores[b.name].double() for b in group]).sum(0)
        order = total.argsort(descending=True, stable=True)
        if widths is not None:
            order = order[: widths[group[0].name]].sort().values
        for block in group:
            orders[block.name] = order
    where = keep(orders, context.work_dir, "channels")
    for block in [block for group in tied(scored.blocks) for block in group]:
        count = len(orders[block.name])
        plan.sites.append(Site(block.name, width=int(block.sizes["width"]), kept=count, channels=where))
    return plan


def carried_out(step: Pass, program: Program, plan: Plan) -> Plan:
    """Return a plan that was tried, without the feed-forwards whose channels cannot be traced to weights."""
    if not plan.sites:
        return plan
    try:
        step.tried(program, plan)
    except ValueError:
        _refuse_stuck(step, program, plan)
        if plan.sites:
            step.tried(program, plan)
    except Exception as error:
        # the pipeline finds out which site fails, and leaves it out
        if not may_be_left_out(error):
            raise
    return plan


def _refuse_stuck(step: Pass, program: Program, plan: Plan) -> None:
    """Move feed-forwards whose channels cannot be selected from the sites to the refusals, with those tied to them."""
    probe = step.copied(program)
    split_all(probe, {site.block for site in plan.sites})
    chosen = _channels_by_block(plan)
    for group in tied([b for b in probe.anatomy.ffn if b.name in chosen]):
        try:
            take_channels(probe, group, chosen)
        except ValueError as problem:
            names = {b.name for b in group}
            plan.refused += [
                Refused(name, f"its channels cannot be traced to weights: {problem}") for name in names
            ]
            plan.sites = [site for site in plan.sites if site.block not in names]


def take_planned(program: Program, plan: Plan) -> None:
    """Select the channels that a plan names."""
    split_all(program, {site.block for site in plan.sites})
    chosen = _channels_by_block(plan)
    take_channels(program, [b for b in program.anatomy.ffn if b.name in chosen], chosen)


def _channels_by_block(plan: Plan) -> dict[str, torch.Tensor]:
    """Return the channels of a plan by block."""
    return {site.block: kept(str(site["channels"]))[site.block] for site in plan.sites}
