"""Removing the least important experts of mixture-of-experts layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...ir.anatomy import Block
from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import note_checkpoint
from ...ir.option import option
from ...ir.program import Program
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Refused, Site, Trial
from .selecting import expert_scores, groups_of, take_experts

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class PruneExperts(Pass):
    """Remove experts from MoE layers; the router chooses among the remaining ones.

    Experts are scored by their routing over calibration tokens: the sum of routing weights, or the number of tokens.
    With the same number left in every MoE layer the result can be written back to a plain Hugging Face folder.
    """

    name = "prune-experts"
    contract = Approximate()
    trial = {"fraction": 0.25, "score": "random"}  # noqa: RUF012

    fraction: float | None = option(None, help="share of the experts to remove", low=0, high=1)
    keep: int | None = option(None, help="how many experts to keep", low=1)
    score: str = option(
        "weight", help="score of an expert's importance", choices=("weight", "count", "random")
    )
    budget: float | None = option(None, help="largest relative loss that is accepted", low=0)
    metric: str = option("auto", help="what the loss is measured by", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require exactly one option that says how many experts are kept."""
        if (self.fraction is None) == (self.keep is None):
            raise PipelineError(
                f"{self.name}: say how many experts to remove or keep", hint="fraction=0.25, or keep=6"
            )

    def plan(self, program: Program, context: Context) -> Plan:
        """Score experts and choose which to keep."""
        plan = Plan()
        prunable: list[Block] = []
        for block in program.anatomy.experts:
            if block.parts.get("core") is None or block.parts.get("router") is None:
                reason = "its experts or its router were not recognised"
                plan.refused.append(Refused(block.name, reason, program.source_line(block.term)))
            else:
                prunable.append(block)
        if not prunable:
            return plan
        scores = expert_scores(program, context, prunable, self.score)
        trial = self.copied(program)
        trials = {b.name: b for b in trial.anatomy.experts}
        failed = False
        for block in prunable:
            count, active = int(block.sizes["experts"]), int(block.sizes["active"])
            left = self.keep if self.keep is not None else count - int(count * (self.fraction or 0.0))
            if left > count or left < active:
                raise PassRefusedError(
                    f"{self.name}: {block.name} has {count} experts, {active} of them active; {left} cannot be kept"
                )
            groups = groups_of(block)
            if left % groups:
                plan.refused.append(
                    Refused(block.name, f"its router looks at experts in {groups} groups, which {left} do not fill evenly",
                            program.source_line(block.term))
                )  # fmt: skip
                continue
            # equally many of each group, so that groups remain
            best_of_groups = (
                scores[block.name]
                .reshape(groups, -1)
                .argsort(dim=1, descending=True, stable=True)[:, : left // groups]
            )
            starts = torch.arange(0, count, count // groups)[:, None]
            chosen = sorted((best_of_groups + starts).flatten().tolist())
            try:
                take_experts(trial, trials[block.name], chosen)
            except ValueError as problem:
                failed = True
                plan.refused.append(Refused(block.name, str(problem), program.source_line(block.term)))
                continue
            plan.sites.append(Site(block.name, experts=count, left=chosen))
        if plan.sites and not failed:
            _record_counts(trial, plan, len(trials))
            plan.trial = Trial(self, program, plan.sites, trial)
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Remove the experts that the plan does not name."""
        if not plan.sites:
            return
        blocks = {b.name: b for b in program.anatomy.experts}
        for site in plan.sites:
            take_experts(program, blocks[site.block], [int(e) for e in site["left"]])
        _record_counts(program, plan, len(blocks))


def _record_counts(program: Program, plan: Plan, layer_count: int) -> None:
    """Record how many experts are left, for the configuration of a folder."""
    counts = {(int(s["experts"]), len(s["left"])) for s in plan.sites}
    if len(counts) == 1 and len(plan.sites) == layer_count:
        note_checkpoint(program, expert_counts=(counts.pop(),))
    else:
        block_export(
            program, "MoE layers have different numbers of experts, for which the configuration has one entry"
        )
