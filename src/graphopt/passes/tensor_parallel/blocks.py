"""Which blocks of a model can be sharded over ranks, and sharding them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import PipelineError
from ...ir.groups import TENSOR_PARALLEL
from ...ir.program import Program
from ...ir.ranks.placement import Shard
from ...ir.schema import arguments, is_operator, normal_call
from ..framework.plan import Plan, Refused, Site
from ..shared.cutting import Cutter, all_reduce, even, local_starts, row_parallel
from .huggingface_plan import chosen_by, read_plan
from .nested import cut_nested, nested_site

if TYPE_CHECKING:
    from .shard_tensor_parallel import ShardTensorParallel

aten, composites = torch.ops.aten, torch.ops.graphopt
_LARGE_TABLE = 64 << 20


def possible_sizes(program: Program) -> list[int]:
    """Return the numbers of ranks that divide all heads evenly."""
    heads = [b.sizes["heads"] for b in program.anatomy.attention if "heads" in b.sizes]
    return [n for n in range(2, max(heads, default=1) + 1) if all(h % n == 0 for h in heads)]


class Placer:
    """Shards the blocks of one program."""

    def __init__(self, program: Program, options: ShardTensorParallel):
        self.program = program
        self.options = options
        self.ranks = options.ranks
        self.cutter = Cutter(program)
        self.blocks = {block.name: block for block in program.anatomy.blocks}
        self.ends = {"embedding": list(program.anatomy.embedding), "head": list(program.anatomy.head)}
        self.wanted = read_plan(options.huggingface_plan) if options.huggingface_plan else None
        self.failed = False
        """Whether sharding a block failed midway, so that the graph has unfinished changes."""

    def plan(self) -> Plan:
        """Shard everything that can be sharded, in the order of the graph, and return the plan."""
        plan = Plan()
        for name, block in self.blocks.items():
            site = self._site(block)
            if isinstance(site, str):
                plan.refused.append(Refused(name, site, self.program.source_line(block.term)))
                continue
            before = len(self.cutter.in_full)
            try:
                self._shard_block(block, site)
            except _CannotShard as problem:
                self.failed = True
                plan.refused.append(Refused(name, str(problem), self.program.source_line(block.term)))
                continue
            plan.sites.append(site)
            inside = set(block.nodes)
            for node, reason in self.cutter.in_full[before:]:
                if node not in inside:
                    continue  # position biases and masks, which are cheap
                plan.notes.append(
                    f"{name}: {node.name} is computed in full on every rank, then sharded: {reason}"
                )
        for name in ("embedding", "head"):
            for node in self.ends[name]:
                site = self._end(name, node)
                if isinstance(site, str):
                    if site:
                        plan.refused.append(Refused(node.name, site, self.program.source_line(node)))
                    continue
                self.cut(site)
                plan.sites.append(site)
        return plan

    # -- what is possible -----------------------------------------------------------------------------

    def _site(self, block: Block) -> Site | str:
        kinds: dict[str, Callable[[Block], Site | str]] = {
            "attention": self._attention_site, "ffn": self._ffn_site, "experts": self._experts_site,
        }  # fmt: skip
        if block.kind not in kinds:
            return (
                f"it is no attention, feed-forward or MoE layer ({block.kind}); every rank computes all of it"
            )
        if self.wanted is not None:
            refusal = chosen_by(self.wanted, self.program, block)
            if refusal:
                return refusal
        return kinds[block.kind](block)

    def _attention_site(self, block: Block) -> Site | str:
        if self.options.attention == "replicate":
            return "attention=replicate keeps it replicated"
        core, out = block.parts.get("core"), block.parts.get("o")
        if core is None:
            return "its scores were not recognised as one attention operator; every rank computes all of it"
        if out is None or not is_operator(out, "aten.linear"):
            return "no linear reads its heads"
        heads, shared = block.sizes["heads"], block.sizes["kv_heads"]
        if heads % self.ranks:
            return f"its {heads} heads do not divide over {self.ranks} ranks"
        if shared % self.ranks and self.ranks % shared:
            return (
                f"its {shared} key-value heads neither divide over {self.ranks} ranks nor are shared evenly"
            )
        keys = "split" if shared % self.ranks == 0 else "replicated"
        return Site(
            block.name, heads=heads // self.ranks, key_value_heads=max(1, shared // self.ranks), keys=keys
        )

    def _ffn_site(self, block: Block) -> Site | str:
        width = int(block.sizes["width"])
        if "core" in block.parts:
            return nested_site(block, self.ranks)
        if width % self.ranks:
            return f"its width of {width} does not divide over {self.ranks} ranks"
        return Site(block.name, width=width // self.ranks)

    def _experts_site(self, block: Block) -> Site | str:
        core = block.parts.get("core")
        if core is None:
            return "its experts were not recognised as one operator; every rank computes all of it"
        args = arguments(core)
        inner = int(args["down"].meta["val"].shape[1 if args["transposed"] else 2])
        count = int(args["up"].meta["val"].shape[0])
        how = self.options.experts
        if how == "auto":
            how = "width" if inner % self.ranks == 0 else "expert"
        if how == "replicate":
            return "experts=replicate keeps it replicated"
        number, unit = (inner, "width") if how == "width" else (count, "experts")
        if number % self.ranks:
            return f"its {unit} of {number} do not divide over {self.ranks} ranks"
        return Site(block.name, by=how, share=number // self.ranks)

    def _end(self, name: str, node: fx.Node) -> Site | str:
        if self.options.embedding == "replicate" or self.wanted is not None:
            return ""
        if not is_operator(node, "aten.embedding" if name == "embedding" else "aten.linear"):
            return ""
        table = arguments(node)["weight"]
        rows = int(table.meta["val"].shape[0])
        large = table.meta["val"].numel() * table.meta["val"].dtype.itemsize > _LARGE_TABLE
        if self.options.embedding == "auto" and not large:
            return ""
        if table not in self.cutter.constant:
            return "its table depends on the input"
        if rows % self.ranks:
            return f"its {rows} rows do not divide over {self.ranks} ranks"
        if name == "embedding" and arguments(node).get("max_norm") is not None:
            return "its rows are renormalised"
        return Site(node.name, part=name, rows=rows // self.ranks)

    # -- cutting --------------------------------------------------------------------------------------

    def cut(self, site: Site) -> None:
        """Shard one site.

        Raises:
            PipelineError: the program has no such site.
        """
        if "part" in site.choices:
            nodes = {n.name: n for n in self.ends[str(site["part"])]}
            if site.block not in nodes:
                raise PipelineError(
                    f"the plan names {site.block!r}, which is no {site['part']} of this program"
                )
            (self._shard_table if site["part"] == "embedding" else self._shard_head)(nodes[site.block])
            return
        block = self.blocks.get(site.block)
        if block is None:
            raise PipelineError(
                f"the plan names {site.block!r}, which this program does not have",
                hint=f"its blocks are {', '.join(self.blocks)}",
            )
        again = self._site(block)
        if isinstance(again, str):
            raise PipelineError(f"the plan shards {site.block}, which is impossible: {again}")
        self._shard_block(block, site)

    def _shard_block(self, block: Block, site: Site) -> None:
        if block.kind == "attention":
            self._shard_attention(block)
        elif block.kind == "ffn" and "core" in block.parts:
            cut_nested(self.program, self.cutter, block, self.ranks)
        elif block.kind == "ffn":
            self._shard_ffn(block.parts["down"])
        else:
            self._shard_experts(block, str(site["by"]))

    def _shard_attention(self, block: Block) -> None:
        out = block.parts["o"]
        width = int(arguments(out)["weight"].meta["val"].shape[1])
        if width % self.ranks:
            raise _CannotShard(
                f"what its last projection reads, {width} wide, does not divide over its heads"
            )
        row_parallel(self.program, self.cutter, out, even(width, self.ranks, 0))
        if block.parts["core"] not in self.cutter.cut_cores:
            # every rank would compute all heads: correct, but pointless
            reason = (
                self.cutter.in_full[-1][1]
                if self.cutter.in_full
                else "the computation of its heads is not understood"
            )
            raise _CannotShard(f"its heads cannot be computed apart: {reason}")

    def _shard_ffn(self, down: fx.Node) -> None:
        width = int(arguments(down)["weight"].meta["val"].shape[1])
        if width % self.ranks:
            raise _CannotShard(f"its width of {width} does not divide over {self.ranks} ranks")
        row_parallel(self.program, self.cutter, down, even(width, self.ranks, 0))

    def _shard_experts(self, block: Block, how: str) -> None:
        core = block.parts["core"]
        (self._shard_expert_width if how == "width" else self._shard_by_expert)(core)
        shared = block.parts.get("shared_down")
        if shared is not None and is_operator(shared, "aten.linear"):
            width = int(arguments(shared)["weight"].meta["val"].shape[1])
            if width % self.ranks == 0:
                row_parallel(self.program, self.cutter, shared, even(width, self.ranks, 0))

    def _shard_expert_width(self, core: fx.Node) -> None:
        args = dict(arguments(core))
        call = self.program.edit.call
        rows, columns = (2, 1) if args["transposed"] else (1, 2)
        inner = int(args["down"].meta["val"].shape[columns])
        shard = even(inner, self.ranks, 0)
        bias = args["down_bias"]
        with self.program.edit.before(core):
            args["up"] = self._hidden(args["up"], rows, shard, args)
            if args["up_bias"] is not None:
                args["up_bias"] = self._hidden(args["up_bias"], 1, shard, args)
            args["down"] = self.cutter.part(
                args["down"], Shard(columns, shard.starts, shard.length, shard.total)
            )
            args["down_bias"] = None
            total = all_reduce(self.program, self._call(core, args))
            if bias is not None:
                bias_of_expert = call(aten.embedding.default, bias, args["experts"])
                weights = call(aten.unsqueeze.default, args["weights"], -1)
                added = call(aten.sum.dim_IntList, call(aten.mul.Tensor, bias_of_expert, weights), [1])
                if added.meta["val"].dtype != total.meta["val"].dtype:
                    added = call(aten.to.dtype, added, total.meta["val"].dtype)
                total = call(aten.add.Tensor, total, added)
        self.program.edit.replace(core, total)

    def _hidden(self, tensor: fx.Node, dim: int, shard: Shard, args: dict[str, Any]) -> fx.Node:
        """Return the rows of a rank's share of the width, for the gate and the value that it multiplies."""
        if not args["gated"]:
            return self.cutter.part(tensor, Shard(dim, shard.starts, shard.length, shard.total))
        if args["interleaved"]:
            twice = shard.at(dim, 2)
            assert twice is not None
            return self.cutter.part(tensor, twice)
        call = self.program.edit.call
        halves = [
            call(aten.slice.Tensor, tensor, dim, half * shard.total, (half + 1) * shard.total)
            for half in (0, 1)
        ]
        halves_of_rank = [
            self.cutter.part(half, Shard(dim, shard.starts, shard.length, shard.total)) for half in halves
        ]
        return call(aten.cat.default, halves_of_rank, dim)

    def _shard_by_expert(self, core: fx.Node) -> None:
        args = dict(arguments(core))
        count = int(args["up"].meta["val"].shape[0])
        shard = even(count, self.ranks, 0)
        with self.program.edit.before(core):
            for name in ("up", "down", "up_bias", "down_bias"):
                if args[name] is not None:
                    args[name] = self.cutter.part(args[name], shard)
            args["first"] = local_starts(self.program, shard)
            total = all_reduce(self.program, self._call(core, args))
        self.program.edit.replace(core, total)

    def _call(self, core: fx.Node, operands: dict[str, Any]) -> fx.Node:
        args, kwargs = normal_call(core.target, operands)
        return self.program.edit.call(core.target, *args, **kwargs)

    def _shard_table(self, node: fx.Node) -> None:
        args = arguments(node)
        rows = int(args["weight"].meta["val"].shape[0])
        shard = even(rows, self.ranks, 0)
        with self.program.edit.before(node):
            table = self.cutter.part(args["weight"], shard)
            start = local_starts(self.program, shard)
            local = self.program.edit.call(composites.local_embedding.default, table, args["indices"], start)
            total = all_reduce(self.program, local)
        self.program.edit.replace(node, total)

    def _shard_head(self, node: fx.Node) -> None:
        rows = int(arguments(node)["weight"].meta["val"].shape[0])
        last = node.meta["val"].dim() - 1
        with self.program.edit.before(node):
            local = self.cutter.part(node, even(rows, self.ranks, last))
            gathered = self.program.edit.call(
                composites.all_gather.default, local, last, self.ranks, TENSOR_PARALLEL
            )
        self.program.edit.replace(node, gathered)


class _CannotShard(Exception):
    """Raised if a block cannot be sharded after all; the message says why."""


__all__ = ["Placer", "possible_sizes"]
