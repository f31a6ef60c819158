"""Ordering heads so that a contiguous split over ranks gives diverse groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import PipelineError
from ...ir.facts import TensorParallel
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.execute import interpret
from ...ir.schema import arguments, is_operator, normal_call
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site, Trial
from ..shared.reorder import reorder_heads
from .grouping import match, scatter

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class GroupHeads(Pass):
    """Order the heads of each attention so that every rank gets heads with different attention maps.

    Head grouping of SPD (arXiv 2502.20727), to be run before ``shard-tensor-parallel``: *scatter* chooses groups with
    the largest differences between attention maps inside a group (pairwise exchanges); *match* assigns groups to the
    ranks' shares of the following feed-forward so that activations are largest (linear assignment). The outputs do
    not change. In an exported Hugging Face folder, any engine that splits heads in order uses these groups. Key-value
    heads move with all queries that share them.
    """

    name = "group-heads"
    contract = Exact()
    excludes = (TensorParallel,)
    paper = "arXiv 2502.20727"
    trial = {"size": 2}  # noqa: RUF012

    size: int = option(8, help="number of ranks the heads will be split over", low=2, high=1024)
    blocks: list[int] | None = option(None, help="numbers of the attention blocks, from 0; all if not given")  # noqa: RUF009
    match: bool = option(True, help="assign groups to shares of the feed-forward", source="paper")

    def plan(self, program: Program, context: Context) -> Plan:
        """Measure attention maps and choose an order of heads for each block."""
        plan = Plan()
        attention = program.anatomy.attention
        wrong = [n for n in self.blocks or [] if not 0 <= n < len(attention)]
        if wrong:
            raise PipelineError(
                f"{self.name}: there is no attention {wrong[0]}; they are numbered 0 to {len(attention) - 1}"
            )
        blocks = attention if self.blocks is None else [attention[n] for n in self.blocks]
        able: list[Block] = []
        for block in blocks:
            reason = self._refusal(block)
            if reason:
                plan.refused.append(Refused(block.name, reason, program.source_line(block.term)))
            else:
                able.append(block)
        if not able:
            return plan
        distances = self._distances(program, context, able)
        trial = self.copied(program)
        trials = {b.name: b for b in trial.anatomy.attention}
        failed = False
        for block in able:
            groups, gain = scatter(distances[block.name], self.size)
            following = self._ffn_after(program, block) if self.match else None
            if following is not None:
                groups = self._matched(program, context, block, following, groups)
            order = [unit for group in groups for unit in group]
            try:
                reorder_heads(trial, trials[block.name], order)
            except ValueError as problem:
                failed = True
                plan.refused.append(
                    Refused(block.name, f"its heads cannot be followed to weights: {problem}")
                )
                continue
            plan.sites.append(Site(block.name, order=order))
            plan.scores[block.name] = gain
        if plan.scores:
            plan.notes.append("scores: difference within groups, relative to random groups")
        if not failed:
            plan.trial = Trial(self, program, plan.sites, trial)
        return plan

    def _refusal(self, block: Block) -> str:
        if "core" not in block.parts or not is_operator(block.parts.get("o"), "aten.linear"):
            return "its heads were not recognised"
        units = block.sizes["kv_heads"]
        if units % self.size:
            return f"its {units} key-value heads do not divide over {self.size} ranks"
        if units == self.size:
            return f"each of {self.size} ranks gets one key-value head: there is nothing to choose"
        if block.sizes.get("cross"):
            return "its keys come from another stream"
        if block.sizes.get("shared_keys"):
            return "its keys are an earlier block's"
        return ""

    def _distances(self, program: Program, context: Context, blocks: list[Block]) -> dict[str, torch.Tensor]:
        """Return the distances between attention maps, summed over calibration sequences, (units, units) by block."""
        distances: dict[str, torch.Tensor] = {}
        cores = {b.name: b.parts["core"] for b in blocks}
        needed = {n: None for core in cores.values() for n in core.all_input_nodes}
        context.progress.start(f"attention maps of {len(blocks)} blocks", len(context.batches()))
        for _, values in context.record(program, needed):
            for block in blocks:
                maps = _maps(cores[block.name], values)
                each = maps.shape[1] // block.sizes["kv_heads"]
                flat = maps.double().flatten(2)
                apart = torch.cdist(flat, flat).sum(0)
                apart = apart.unflatten(0, (-1, each)).unflatten(2, (-1, each)).sum((1, 3))  # type: ignore[no-untyped-call]
                distances[block.name] = distances.get(block.name, torch.zeros_like(apart)) + apart
            context.progress.step()
        context.progress.done()
        return distances

    def _ffn_after(self, program: Program, block: Block) -> Block | None:
        after = [b for b in program.anatomy.blocks if b.reads is block.writes]
        if len(after) != 1 or after[0].kind != "ffn" or block.parallel or block.term is not block.parts["o"]:
            return None
        if "down" not in after[0].parts:  # it has several widths
            return None
        return after[0] if int(after[0].sizes["width"]) % self.size == 0 else None

    def _matched(
        self, program: Program, context: Context, block: Block, ffn: Block, groups: list[list[int]]
    ) -> list[list[int]]:
        """Assign groups to ranks by the activations of each rank's share of the feed-forward, on one batch."""
        batch = context.bound(program, context.batches()[0])
        out, down = block.parts["o"], ffn.parts["down"]
        out_args, down_args = arguments(out), arguments(down)
        heads, hidden = out_args["input"], down_args["input"]
        values = interpret(program, batch, record=[heads, block.reads], stop=True)
        weights = interpret(
            program, {},
            record=dict.fromkeys(
                n for n in (out_args["weight"], out_args["bias"], down_args["weight"]) if n is not None
            ),
            stop=True,
        )  # fmt: skip
        matrix, narrow = weights[out_args["weight"].name], weights[down_args["weight"].name]
        bias = 0 if out_args["bias"] is None else weights[out_args["bias"].name]
        queries_per_head = matrix.shape[1] // block.sizes["kv_heads"]
        shares = narrow.chunk(self.size, 1)
        sizes = torch.zeros(self.size, self.size)
        for g, group in enumerate(groups):
            columns = torch.cat(
                [torch.arange(u * queries_per_head, (u + 1) * queries_per_head) for u in group]
            )
            partial = torch.nn.functional.linear(values[heads.name][..., columns], matrix[:, columns])
            stream = values[block.reads.name] + partial + bias
            activations = interpret(program, batch, known={ffn.reads: stream}, record=[hidden], stop=True)[
                hidden.name
            ]
            for r, local in enumerate(activations.chunk(self.size, -1)):
                sizes[g, r] = torch.nn.functional.linear(local, shares[r]).norm()
        return [groups[g] for g in match(sizes)]

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Reorder the heads as planned."""
        blocks = {b.name: b for b in program.anatomy.attention}
        for site in plan.sites:
            reorder_heads(program, blocks[site.block], [int(u) for u in site["order"]])


def _maps(core: fx.Node, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return attention maps (batch, heads, queries, keys), by applying the operator to an identity matrix as values."""
    recorded: dict[str, Any] = {
        k: values[v.name] if isinstance(v, fx.Node) else v for k, v in arguments(core).items()
    }
    keys = recorded["k"]
    recorded["v"] = torch.eye(keys.shape[2], dtype=keys.dtype).expand(*keys.shape[:2], -1, -1)
    args, kwargs = normal_call(core.target, recorded)
    maps: torch.Tensor = core.target(*args, **kwargs)  # type: ignore[operator]
    return maps
