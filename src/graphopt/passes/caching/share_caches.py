"""Keys and values of one layer read by the layers after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import KVCache, TensorParallel
from ...ir.needs import ABSENT
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.schema import arguments, is_operator
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.kept_tensors import keep, kept
from ..framework.plan import Plan, Refused, Site
from ..shared.fused_projections import FusedPart, fused_linears, separate
from ..shared.unread_weights import weights_of
from .absorbing import Queries, absorb_keys, absorb_values, outputs_of, queries_of
from .fitting import moments_of
from .likeness import Likeness

if TYPE_CHECKING:
    from ...measure.context import Context

NO_FOLDER = "layers read the keys and values of others, which the architecture's own code does not do"


@dataclass(frozen=True)
class _Follower:
    """What rewriting a site needs: its attention, the one whose keys and values it reads, and projections to split."""

    core: fx.Node
    leader: fx.Node
    name: str
    fused: tuple[tuple[fx.Node, list[FusedPart]], ...]


@dataclass(frozen=True, kw_only=True)
class ShareCaches(Pass):
    """Let layers read the keys and values of an earlier layer, so that one cache serves several.

    Cross-layer attention (arXiv 2405.12981): in groups of ``groups`` layers, all read the keys and values of the first.
    YOCO (arXiv 2405.05254): with ``start``, all layers from that one on read those of the layer before it. Their own
    projections of keys and values are removed; run ``insert-cache`` afterwards.

    With data, a layer's values are fitted head by head by the values that it reads, and its keys, pair by rotated
    pair, by the keys that it reads; the fits are taken into its projections of output and queries, so that they cost
    nothing. What is left to lose is for training.
    """

    name = "share-caches"
    contract = Approximate()
    excludes = (KVCache, TensorParallel)
    paper = "arXiv 2405.12981, 2405.05254"

    groups: int = option(
        2, help="layers that share keys and values", source="paper", low=2, needs={"start": ABSENT}
    )
    start: int | None = option(
        None, help="number of the first attention, from 0, that reads those of the one before, as all later ones do",
        low=1,
    )  # fmt: skip
    fit: bool = option(True, help="fit keys and values on data, if there is any")
    ridge: float = option(
        1e-3,
        help="of the mean square, added to that of each direction in a fit",
        low=0,
        high=1,
        needs={"fit": True},
    )
    budget: float | None = option(None, help="largest relative loss", low=0)
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the attentions that can read the keys and values of an earlier one, and why others cannot."""
        attention = program.anatomy.attention
        if self.start is not None and self.start >= len(attention) > 0:
            raise PipelineError(
                f"{self.name}: there is no attention {self.start}; they are numbered 0 to {len(attention) - 1}"
            )
        likeness = Likeness(program)
        fused = dict(fused_linears(program))
        for leader, follower, reason in self._pairs(program):
            if not reason and leader is not None:
                found = _follower(leader, follower, likeness, fused)
                if isinstance(found, _Follower):
                    yield Site(follower.name, leader=leader.name), found
                    continue
                reason = found
            yield Refused(follower.name, reason, program.source_line(follower.term))

    def _pairs(self, program: Program) -> Iterator[tuple[Block | None, Block, str]]:
        """Yield the attention that is to be read, the one that is to read it, and why that cannot be."""
        for blocks in _by_stream(program):
            own: list[Block] = []
            for block in blocks:
                reason = _own_keys(block)
                if self.start is None:
                    leader = own[-(len(own) % self.groups)] if len(own) % self.groups else None
                else:
                    leader = next((b for b in reversed(own) if b.index < self.start), None)
                    leader = leader if block.index >= self.start else None
                if reason:
                    yield None, block, reason
                    continue
                own.append(block)
                if leader is not None:
                    yield leader, block, ""

    def plan(self, program: Program, context: Context) -> Plan:
        """Find which layers can read which, and fit them if there is data."""
        findings = self.findings(program)
        plan = findings.plan()
        if not plan.sites or not self.fit:
            return plan
        if not context.data:
            plan.notes.append("no data: keys and values are read as they are, without a fit")
            return plan
        self._fit(program, context, plan, findings.work)
        return plan

    def _fit(self, program: Program, context: Context, plan: Plan, work: dict[str, _Follower]) -> None:
        wanted: dict[str, tuple[fx.Node, fx.Node]] = {}
        queries: dict[str, Queries] = {}
        plain: Counter[str] = Counter()
        for site in plan.sites:
            found = work[site.block]
            own, theirs = arguments(found.core), arguments(found.leader)
            into = queries_of(program, found.core)
            if isinstance(into, Queries):
                queries[site.block] = into
                wanted[f"{site.block}.keys"] = own["k"], theirs["k"]
            else:
                plain[f"keys are read as they are, since {into}"] += 1
            outputs = outputs_of(program, found.core)
            if isinstance(outputs, str):
                plain[f"values are read as they are, since {outputs}"] += 1
            else:
                wanted[f"{site.block}.values"] = own["v"], theirs["v"]
        plan.notes += [f"{count} of {len(plan.sites)}: {reason}" for reason, count in plain.items()]
        if not wanted:
            return
        moments = moments_of(program, context, wanted)
        maps: dict[str, torch.Tensor] = {}
        for name, sums in moments.items():
            if name.endswith(".keys"):
                maps[name] = sums.fit_turning(queries[name.removesuffix(".keys")].pairs, self.ridge)
            else:
                maps[name] = sums.fit(self.ridge)
            plan.scores[name] = sums.missed(maps[name])
        where = keep(maps, context.work_dir, "shared-caches")
        for site in plan.sites:
            fitted = [what for what in ("keys", "values") if f"{site.block}.{what}" in maps]
            site.choices.update(fitted=fitted, maps=where if fitted else "")
        plan.notes.append("scores: share of the square of a layer's keys or values that the fit misses")

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Report how many pairs of keys and values are left, and their bytes for each token."""
        sizes = {}
        for node in program.graph.nodes:
            if is_operator(node, "graphopt.attention"):
                args = arguments(node)
                values = [args[n].meta["val"] for n in ("k", "v")]
                sizes[args["k"], args["v"]] = [v.shape[1] * v.shape[3] * v.dtype.itemsize for v in values]
        work = self.findings(program).work
        gone = {
            (args["k"], args["v"])
            for site in plan.sites
            if site.block in work
            for args in [arguments(work[site.block].core)]
        }
        before = sum(map(sum, sizes.values()))
        after = sum(sum(size) for pair, size in sizes.items() if pair not in gone)
        return [
            f"keys and values: {len(sizes)} -> {len(sizes) - len(gone)} pairs, "
            f"{before:,} -> {after:,} bytes for each token"
        ]

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Let the planned layers read their leader's keys and values, and remove what made their own."""
        if not plan.sites:
            return
        chosen = self.chosen(program, plan)
        for site, found in chosen:
            if site["leader"] != found.name:
                raise PassRefusedError(
                    f"{self.name}: the plan lets {site.block} read {site['leader']}, but with these options it reads "
                    f"{found.name}",
                    hint="leave sites out, or plan again with other options",
                    node=site.block,
                )
        before = _weights_read(program, ())
        apart: set[fx.Node] = set()
        for linear, pieces in (pair for _, found in chosen for pair in found.fused):
            if linear not in apart:
                apart.add(linear)
                for piece in pieces:
                    separate(program, linear, piece)
        changed: dict[fx.Node, fx.Node] = {}
        for site, found in chosen:
            changed |= _absorbed(program, site, found.core)
            own, theirs = arguments(found.core), arguments(found.leader)
            program.edit.change(found.core, k=theirs["k"], v=theirs["v"])
            program.edit.erase_dead([own["k"], own["v"]])
        _forget(program, before, changed)
        block_export(program, NO_FOLDER)


def _by_stream(program: Program) -> list[list[Block]]:
    """Return the attentions of each residual stream, in order; those on no stream of their own make another list."""
    attention = program.anatomy.attention
    places = {
        id(block): number
        for number, stream in enumerate(program.anatomy.streams)
        for block in stream.blocks
        if block.kind == "attention"
    }
    streams: dict[int, list[Block]] = {}
    for block in attention:
        streams.setdefault(places.get(id(block), -1), []).append(block)
    return list(streams.values())


def _own_keys(block: Block) -> str:
    """Return why an attention takes no part in sharing; empty if it has keys of its own."""
    if block.sizes.get("cross"):
        return "its keys come from another stream"
    if block.sizes.get("shared_keys"):
        return "its keys are an earlier block's already"
    if sum(is_operator(n, "graphopt.attention") for n in block.nodes) != 1:
        return "it has several attentions"
    return ""


def _follower(
    leader: Block, follower: Block, likeness: Likeness, fused: dict[fx.Node, list[FusedPart] | str]
) -> _Follower | str:
    """Return what is needed to let one attention read another's keys and values, or why that cannot be."""
    core, first = follower.parts["core"], leader.parts["core"]
    reason = likeness.difference(first, core, leader.name)
    if reason:
        return reason
    args = arguments(core)
    if any(set(args[n].users) != {core} for n in ("k", "v")):
        return "its keys or values are read elsewhere as well"
    own = [n for n in needed_for([args["k"], args["v"]], {follower.reads}) if n in fused]
    rest = needed_for([args["q"], follower.writes], {follower.reads, args["k"], args["v"]})
    split: list[tuple[fx.Node, list[FusedPart]]] = []
    for linear in own:
        pieces = fused[linear]
        if linear not in rest:
            continue
        if isinstance(pieces, str) or len(pieces) < 2:
            why = pieces if isinstance(pieces, str) and pieces else "it is read whole"
            return f"its keys come from a projection that is needed for more and cannot be split: {why}"
        split.append((linear, pieces))
    return _Follower(core, first, leader.name, tuple(split))


def _absorbed(program: Program, site: Site, core: fx.Node) -> dict[fx.Node, fx.Node]:
    """Take the fits of a site into its projections; return the new weights by the old ones."""
    fitted = site.choices.get("fitted", [])
    if not fitted:
        return {}
    maps = kept(str(site["maps"]))
    changed: dict[fx.Node, fx.Node] = {}
    for what in fitted:
        name = f"{site.block}.{what}"
        if name not in maps:
            raise PipelineError(f"the plan's tensors have no fit for {name}", hint="plan again with data")
        into = queries_of(program, core) if what == "keys" else outputs_of(program, core)
        if isinstance(into, str):
            raise PassRefusedError(f"{name} cannot be fitted: {into}", node=site.block)
        heads, size = arguments(core)[what[0]].meta["val"].shape[1::2]
        if maps[name].shape != (heads, size, size):
            raise PipelineError(
                f"the fit for {name} has the shape {tuple(maps[name].shape)}, not {(heads, size, size)}",
                hint="plan again: it is another model's",
            )
        if isinstance(into, Queries):
            changed |= absorb_keys(program, into, maps[name])
        else:
            changed |= absorb_values(program, into, maps[name])
    return changed


def _weights_read(program: Program, known: tuple[fx.Node, ...]) -> set[fx.Node]:
    needed = needed_for(program.outputs.values(), set(known))
    return {n for n in needed if n.op == "placeholder" and n.name in program.weights}


def _forget(program: Program, before: set[fx.Node], changed: dict[fx.Node, fx.Node]) -> None:
    """Let the checkpoint's names of changed weights mean the new ones, and drop those of weights that are gone.

    Args:
        program: changed in place.
        before: weights that were read before.
        changed: new weights by the old ones.
    """
    lost = before - _weights_read(program, tuple(changed.values()))
    dropped: list[fx.Node] = []
    for name, node in list(program.checkpoint.items()):
        if not weights_of(program, node) & lost:
            continue
        if node in changed:
            program.checkpoint[name] = changed[node]
        else:
            del program.checkpoint[name]
            dropped.append(node)
    program.edit.erase_dead(dropped)
    mapped = set(program.checkpoint.values())
    for node in lost:
        if not node.users and node not in mapped:
            program.edit.remove_weight(node)


__all__ = ["ShareCaches"]
