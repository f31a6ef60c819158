"""Dropping all-reduces after attention that matter little."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import QuantizedCommunication, TensorParallel
from ...ir.needs import ABSENT
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...ir.ranks.placement import placements
from ...ir.ranks.rank_programs import synchronisations
from ...ir.running.execute import release
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Refused, Site
from .sensitivity import backward_sweep, classify
from .sync_points import drop, find_sync_points

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class DropSyncPoints(Pass):
    """Drop the all-reduce after attention where the model tolerates it (SPD, arXiv 2502.20727).

    The feed-forward of each rank then sees only that rank's part of the attention's output; attention is reduced
    together with the feed-forward, so that the stream gets the full sum. With ``blocks`` or ``fraction=1`` no data is
    needed. Otherwise blocks are ranked by the loss from dropping all sync points from there on, measured from the
    last block backwards, and the cheapest are dropped: a ``fraction`` of them, or as many as a ``budget`` allows.

    Blocks are classed by thresholds relative to the original's metric: those at most ``insensitive`` are dropped as
    they are; those up to ``sensitive`` need distillation (``graphopt.training.recipes.block_to_block``); the rest
    want ``group-heads`` before sharding as well. The paper gives no thresholds.
    """

    name = "drop-sync-points"
    contract = Approximate("perplexity")
    requires = (TensorParallel,)
    excludes = (QuantizedCommunication,)
    trial = {"fraction": 1}  # noqa: RUF012
    metric_calibrates = True
    paper = "arXiv 2502.20727"

    fraction: float | None = option(
        None, help="share of attention blocks that lose their sync point", low=0, high=1
    )
    blocks: list[int] | None = option(None, help="numbers of the attention blocks, from 0")  # noqa: RUF009
    budget: float | None = option(
        None, help="largest relative loss; alone: drop as many as stay within it", low=0
    )
    insensitive: float = option(
        0.005,
        help="relative loss up to which a block counts as insensitive",
        low=0,
        needs={"blocks": ABSENT},
    )
    sensitive: float = option(
        0.05, help="relative loss up to which a block counts as sensitive", low=0, needs={"blocks": ABSENT}
    )
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require one criterion, and thresholds in order."""
        if self.fraction is not None and self.blocks is not None:
            raise PipelineError(f"{self.name}: fraction and blocks say the same thing twice; give one")
        if self.fraction is None and self.blocks is None and self.budget is None:
            raise PipelineError(
                f"{self.name}: say how many", hint="fraction=0.7, blocks=[0 1 2] or budget=0.01"
            )
        if self.sensitive < self.insensitive:
            raise PipelineError(f"{self.name}: sensitive is below insensitive")

    def plan(self, program: Program, context: Context) -> Plan:
        """Measure the sensitivity of each sync point, unless it does not matter, and choose."""
        points, refused = find_sync_points(program)
        plan = Plan()
        plan.refused = [
            Refused(name, reason, program.source_line(program.anatomy.block(name).term))
            for name, reason in refused.items()
        ]
        if not points:
            return plan
        names = list(points)
        if self.blocks is not None:
            dropped = self._listed(program, points, refused)
        else:
            dropped = self._by_score(program, context, plan, names)
        plan.sites = self._sites(program, dropped)
        plan.refused += [
            Refused(name, "kept" + (f": score {plan.scores[name]:.4g}" if name in plan.scores else ""))
            for name in names
            if name not in dropped
        ]
        return plan

    def _sites(self, program: Program, dropped: Collection[str]) -> list[Site]:
        points, _ = find_sync_points(program)
        return [Site(name, ffn=point.ffn.name) for name, point in points.items() if name in dropped]

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Report how many all-reduces remain."""
        count = len(synchronisations(program))
        return [f"all-reduces: {count} -> {count - len(plan.sites)}"]

    def _listed(self, program: Program, points: Mapping[str, object], refused: dict[str, str]) -> list[str]:
        assert self.blocks is not None
        attention = [block.name for block in program.anatomy.attention]
        dropped = []
        for number in self.blocks:
            if not 0 <= number < len(attention):
                raise PipelineError(
                    f"{self.name}: there is no attention {number}; they are numbered 0 to {len(attention) - 1}"
                )
            if attention[number] not in points:
                raise PassRefusedError(f"{self.name}: {attention[number]}: {refused[attention[number]]}")
            dropped.append(attention[number])
        return dropped

    def _by_score(self, program: Program, context: Context, plan: Plan, names: list[str]) -> list[str]:
        if self.fraction is not None:
            count = round(self.fraction * len(names))
            if count in (0, len(names)) or not context.data:
                refuse_set(
                    self.name, self, ("insensitive", "sensitive"),
                    "nothing is measured" + (" without data" if not context.data else " to drop all or none"),
                )  # fmt: skip
            if count in (0, len(names)):
                return names[:count]
            if not context.data:
                plan.notes.append(
                    "no data: the blocks in the middle of the model are dropped, without a measurement"
                )
                return _middle(names, count)
        scores = backward_sweep(program, context, self.metric, plan.notes.append)
        plan.scores = dict(scores)
        classes = classify(scores, self.insensitive, self.sensitive)
        for kind in ("insensitive", "sensitive", "extremely sensitive"):
            members = [name for name in names if classes[name] == kind]
            plan.notes.append(
                f"{kind}: {len(members)} of {len(names)}" + (f" ({', '.join(members)})" if members else "")
            )
        order = sorted(names, key=lambda name: scores[name])
        if self.fraction is not None:
            return order[: round(self.fraction * len(names))]
        return self._within_budget(program, context, plan, order)

    def _within_budget(self, program: Program, context: Context, plan: Plan, order: list[str]) -> list[str]:
        assert self.budget is not None
        low, high = 0, len(order)
        attempt = Plan()
        while low < high:
            count = (low + high + 1) // 2
            attempt.sites = self._sites(program, order[:count])
            attempted = self.tried(program, attempt)
            loss = context.loss(attempted, program, metric=self.metric)
            release(attempted)
            plan.notes.append(f"{count} dropped: loss {loss:.4g}")
            if loss <= self.budget:
                low, plan.trial = count, attempt.trial
            else:
                high = count - 1
        if not low:
            raise PassRefusedError(
                f"{self.name}: even one sync point less costs more than the budget of {self.budget:g}",
                hint=plan.notes[-1],
            )
        return order[:low]

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Drop the planned sync points."""
        if not plan.sites:
            return
        drop(program, [site.block for site in plan.sites])
        block_export(program, ("sync points were dropped, which the architecture's own code does not do"))
        placements(program)


def _middle(names: list[str], count: int) -> list[str]:
    """Choose without a measurement and spare both ends: where measured, the first block was by far the most sensitive."""
    start = (len(names) - count + 1) // 2
    return names[start : start + count]
