"""Splitting dense feed-forwards into experts of nested widths, with routers and one run-time setting."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.errors import PipelineError
from ...ir.export_blockers import block_export
from ...ir.needs import longer
from ...ir.option import option
from ...ir.program import Dial, Program
from ...ir.weights import Drawn
from ..framework.base import Pass
from ..framework.contracts import ExactAt
from ..framework.plan import Plan, Refused, Site
from ..shared.fused_projections import split_all
from .nesting import NESTED, FeedForward, free_name, nested, own_small, place_of, read_feed_forward
from .scores import SCORES
from .sort_ffn import carried_out, plan_orders, score_channels, take_planned

if TYPE_CHECKING:
    from ...measure.context import Context

aten, composites = torch.ops.aten, torch.ops.graphopt
DIAL = "delta"


@dataclass(frozen=True, kw_only=True)
class SplitFfn(Pass):
    """Let a router choose the width of each feed-forward for each token: nested experts (DynaMoE, arXiv 2502.12325).

    Expert e is the first ``widths[e]`` of the hidden channels, sorted by importance, so that nothing is stored twice.
    A router per feed-forward gives each expert a probability; ``program(..., delta=0.5)`` takes the narrowest expert
    up to which they sum to delta. At delta 1, the default, every token gets the full width and nothing changes.
    Routers start without a preference; ``graphopt train --recipe dynamoe`` teaches them which tokens are hard.

    ``separate=true`` gives the smaller expert weights of its own, initialised with the most important channels, and
    ``skip=true`` adds the choice of skipping the feed-forward: Duo-LLM (arXiv 2410.10846) is
    ``widths=[1/16 1] separate=true``, trained by the recipes ``duo-distil`` and ``duo-routers``.
    """

    name = "split-ffn"
    contract = ExactAt(DIAL, 1.0)
    paper = "arXiv 2502.12325, 2410.10846"
    trial = {"score": "peak"}  # noqa: RUF012

    widths: list[float] = option(  # noqa: RUF009
        [0.25, 0.5, 0.75, 1.0],
        help="widths of the experts as shares of the full width, ascending to 1",
        source="paper",
    )
    separate: bool = option(False, help="the smaller of two experts has weights of its own")
    skip: bool = option(False, help="a token may also skip the feed-forward")
    score: str = option(
        "activation", help="score that sorts the channels; peak needs no data, none keeps their order",
        source="paper", choices=(*SCORES, "none"), needs={"widths": longer(1)},
    )  # fmt: skip
    router: str = option(
        "auto", help="two layers or one; auto: two, and one where separate=true", source="recalled",
        choices=("auto", "two-layer", "linear"),
    )  # fmt: skip
    router_size: int | None = option(
        None, help="hidden size of two-layer routers; a sixteenth of the model's if not given", low=1,
        needs=[{"router": "two-layer"}, {"router": "auto", "separate": False}],
    )  # fmt: skip
    multiple: int = option(
        1, help="widths are rounded to a multiple of this; 128 suits GPUs", low=1, needs={"widths": longer(1)}
    )

    def validate(self) -> None:
        """Require widths that ascend to the full width, and a choice between at least two."""
        shares = self.widths
        if (
            not shares
            or shares[0] <= 0
            or shares[-1] != 1
            or any(a >= b for a, b in itertools.pairwise(shares))
        ):
            raise PipelineError(
                f"{self.name}: widths must rise from above 0 to 1, not {' '.join(f'{w:g}' for w in shares)}",
                hint="widths=[1/4 1/2 3/4 1]",
            )
        if len(shares) + self.skip < 2:
            raise PipelineError(
                f"{self.name}: one width leaves nothing to choose", hint="widths=[1/2 1] or skip=true"
            )
        if self.separate and len(shares) != 2:
            raise PipelineError(f"{self.name}: separate=true takes two widths, such as [1/16 1]")

    def plan(self, program: Program, context: Context) -> Plan:
        """Score the channels and take every feed-forward whose activation is supported."""
        scored = score_channels(self, program, context, None if self.score == "none" else self.score)
        if self.score == "none":
            plan = Plan([Site(block.name) for block in scored.blocks], scored.refused)
        else:
            plan = plan_orders(scored, context)
        blocks = {b.name: b for b in scored.blocks}
        sites: list[Site] = []
        for site in plan.sites:
            block = blocks[site.block]
            reason = read_feed_forward(block)
            widths = self._widths(int(block.sizes["width"]))
            if isinstance(reason, FeedForward) and isinstance(widths, list):
                chosen = {k: v for k, v in site.choices.items() if k == "channels"}
                sites.append(Site(site.block, widths=widths, separate=self.separate, **chosen))
                continue
            refusal_reason = reason if isinstance(reason, str) else str(widths)
            plan.refused.append(Refused(site.block, refusal_reason, program.source_line(block.term)))
        plan.sites = sites
        plan = carried_out(self, program, plan)
        if plan.sites:
            plan.notes.append(
                "routers have no preference yet: train them with "
                + ("--recipe duo-distil, then duo-routers" if self.separate else "--recipe dynamoe")
            )
        return plan

    def _widths(self, full_width: int) -> list[int] | str:
        widths = [round(share * full_width / self.multiple) * self.multiple for share in self.widths[:-1]] + [
            full_width
        ]
        if widths[0] < 1 or any(a >= b for a, b in itertools.pairwise(widths)):
            return f"its width of {full_width} has no {len(widths)} different multiples of {self.multiple} near its shares"
        return [0, *widths] if self.skip else widths

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Sort the channels, then add routers that choose widths."""
        if not plan.sites:
            return
        if any("channels" in site.choices for site in plan.sites):
            take_planned(program, plan)
        else:
            split_all(program, {site.block for site in plan.sites})
        blocks = {b.name: b for b in program.anatomy.ffn}
        inputs = program.input_nodes
        delta = inputs[DIAL] if DIAL in program.dials else program.add_dial(
            DIAL, Dial(1.0, 0.0, 1.0, "how much of the routers' probability must be within a token's width")
        )  # fmt: skip
        smalls: dict[fx.Node, FeedForward] = {}
        for site in plan.sites:
            ffn = read_feed_forward(blocks[site.block])
            if isinstance(ffn, str):
                raise PipelineError(f"the plan takes {site.block}, which cannot be taken: {ffn}")
            widths = [int(w) for w in site["widths"]]
            module_path = place_of(program, ffn.down)
            with program.edit.before(ffn.down):
                logits = self._router(program, ffn.x, len(widths), module_path)
                choice = program.edit.call(composites.choose_width.default, logits, delta)
                if site["separate"]:
                    new_output = self._apart(program, ffn, choice, widths, module_path, smalls)
                else:
                    new_output = nested(program, ffn, choice, widths)
            program.edit.replace(ffn.down, new_output)
        block_export(program, NESTED)

    def _apart(
        self, program: Program, ffn: FeedForward, choice: fx.Node, widths: list[int], module_path: str,
        smalls: dict[fx.Node, FeedForward],
    ) -> fx.Node:  # fmt: skip
        """Return the sum of a small and a large expert; each token has width 0 in the one it does not choose."""
        key = ffn.weights["down"]
        assert key is not None
        *_, narrow, full_width = widths
        if key not in smalls:
            smalls[key] = own_small(program, ffn, narrow, module_path)
        template = smalls[key]
        small = FeedForward(ffn.x, ffn.down, template.weights, ffn.activation)
        wide_output = nested(program, ffn, choice, [full_width if w == full_width else 0 for w in widths])
        narrow_output = nested(program, small, choice, [w if w == narrow else 0 for w in widths])
        return program.edit.call(aten.add.Tensor, wide_output, narrow_output)

    def _router(self, program: Program, x: fx.Node, choices: int, module_path: str) -> fx.Node:
        """Return the logits of a new router whose last layer is zero, so that all choices are equally likely."""
        call, add = program.edit.call, program.edit.add_weight
        value = x.meta["val"]
        size = int(value.shape[-1])
        kind = self.router if self.router != "auto" else ("linear" if self.separate else "two-layer")
        if kind == "two-layer":
            inner = self.router_size or max(choices, size // 16)
            first = Drawn(
                (inner, size), value.dtype, sum(module_path.encode()), size**-0.5
            )  # drawn when it is read
            weight = add(free_name(program, f"{module_path}.router_in.weight"), first)
            bias = add(
                free_name(program, f"{module_path}.router_in.bias"), torch.zeros(inner, dtype=value.dtype)
            )
            x = call(aten.relu.default, call(aten.linear.default, x, weight, bias))
            size = inner
        weight = add(
            free_name(program, f"{module_path}.router.weight"), torch.zeros(choices, size, dtype=value.dtype)
        )
        bias = add(free_name(program, f"{module_path}.router.bias"), torch.zeros(choices, dtype=value.dtype))
        return call(aten.linear.default, x, weight, bias)
