"""Removing the least important hidden channels of feed-forwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import note_checkpoint
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.execute import release
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan
from .scores import SCORES, importance_of_blocks
from .sort_ffn import Scored, carried_out, plan_orders, score_channels, take_planned

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class PruneFfn(Pass):
    """Remove hidden channels of feed-forwards: rows of the first projections, columns of the last.

    Equivalent to zeroing them, with less to compute. ``fraction`` of the width is removed, or as much as a ``budget``
    allows. ``allocation=cfsp`` removes less where a block rotates the stream further (arXiv 2409.13199): keep ratios
    are sigmoid(importance) relative to their mean, shrunk towards it until none exceeds one. With one width in all
    layers the result can be written back to a plain Hugging Face folder.
    """

    name = "prune-ffn"
    contract = Approximate()
    paper = "arXiv 2409.13199, 2512.22671"
    trial = {"fraction": 0.5, "score": "peak"}  # noqa: RUF012

    fraction: float | None = option(None, help="share of the hidden channels to remove", low=0, high=1)
    budget: float | None = option(
        None, help="largest relative loss; alone: remove as much as it allows", low=0
    )
    score: str = option(
        "norm",
        help="score of a channel's importance; peak needs no data",
        source="code",
        choices=SCORES,
    )
    allocation: str = option(
        "uniform", help="the same share in all layers, or by importance", choices=("uniform", "cfsp")
    )
    strength: float = option(
        1.0, help="how far ratios follow importance", source="code", low=0, needs={"allocation": "cfsp"}
    )
    multiple: int = option(1, help="widths are a multiple of this; 128 suits GPUs", low=1)
    metric: str = option("auto", help="what the loss is measured by", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require an option that says how much is removed."""
        if self.fraction is None and self.budget is None:
            raise PipelineError(f"{self.name}: say how much to remove", hint="fraction=0.25 or budget=0.01")

    def plan(self, program: Program, context: Context) -> Plan:
        """Score the channels and choose which to keep."""
        scored = score_channels(self, program, context, self.score)
        importance: dict[str, float] = {}
        if self.allocation == "cfsp" and (ffn := scored.program.anatomy.ffn):
            importance = importance_of_blocks(scored.program, context, ffn)
        if self.fraction is not None:
            return carried_out(self, program, self._at(scored, context, self.fraction, importance))
        assert self.budget is not None
        low, high, best, notes = 0, 15, None, []
        while low < high:
            step = (low + high + 1) // 2
            plan = carried_out(self, program, self._at(scored, context, step / 16, importance))
            if not plan.sites:
                return plan
            pruned = plan.trial.after if plan.trial is not None else self.tried(program, plan)
            loss = context.loss(pruned, program, metric=self.metric)
            release(pruned)
            notes.append(f"{step}/16 removed: loss {loss:.4g}")
            if loss <= self.budget:
                low, best = step, plan
            else:
                high = step - 1
        if best is None:
            raise PassRefusedError(
                f"{self.name}: even a sixteenth of the width costs more than the budget of {self.budget:g}",
                hint=notes[-1],
            )
        best.notes += notes
        return best

    def _at(self, scored: Scored, context: Context, fraction: float, importance: dict[str, float]) -> Plan:
        widths = {b.name: int(b.sizes["width"]) for b in scored.blocks}
        ratios = dict.fromkeys(widths, 1 - fraction)
        if importance:
            ratios = cfsp_ratios(importance, 1 - fraction, self.strength)
        kept_widths = {
            name: _rounded_width(widths[name] * ratio, self.multiple, widths[name])
            for name, ratio in ratios.items()
            if name in widths
        }
        return plan_orders(scored, context, kept_widths)

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return a note on how many channels are removed."""
        before = sum(int(s["width"]) for s in plan.sites)
        after = sum(int(s["kept"]) for s in plan.sites)
        return [f"hidden channels: {before} -> {after} ({after / before - 1:+.1%})"] if before else []

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Keep only the planned channels."""
        if not plan.sites:
            return
        covers_all = {b.name for b in program.anatomy.ffn} == {s.block for s in plan.sites}
        has_experts = bool(program.anatomy.experts)
        take_planned(program, plan)
        widths = {(int(s["width"]), int(s["kept"])) for s in plan.sites}
        if len(widths) == 1 and covers_all and not has_experts:
            (pair,) = widths
            if pair[0] != pair[1]:
                note_checkpoint(program, ffn_widths=(pair,))
        else:
            block_export(
                program, "feed-forwards have different widths, for which the configuration has one entry"
            )


def _rounded_width(width: float, multiple: int, most: int) -> int:
    """Return a multiple near the width, at least one and at most the present width."""
    return max(1, min(most, max(multiple, int((width + multiple / 2) // multiple * multiple))))


def cfsp_ratios(importance: dict[str, float], mean: float, strength: float) -> dict[str, float]:
    """Return keep ratios with the given mean, larger for more important blocks.

    ``sigmoid(strength * (I - mean I) / spread)`` relative to its mean; shrunk towards the mean by factors of 1.05 until
    none exceeds one. The released code divides by 1e4, which suits its number of tokens; here the standard deviation
    is used.
    """
    values = list(importance.values())
    centre = sum(values) / len(values)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / len(values)) or 1.0
    raw = {n: 1 / (1 + math.exp(-strength * (v - centre) / spread)) for n, v in importance.items()}
    level = sum(raw.values()) / len(raw)
    ratios = {n: v / level * mean for n, v in raw.items()}
    # rounding may keep the largest slightly above one forever
    while max(ratios.values()) > 1 + 1e-9:
        ratios = {n: mean + (v - mean) / 1.05 for n, v in ratios.items()}
        if mean >= 1:
            return dict.fromkeys(ratios, 1.0)
    return {n: min(v, 1.0) for n, v in ratios.items()}
