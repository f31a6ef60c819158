"""Removing blocks from the residual stream, or skipping them while decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy.rows import shaped_like
from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export, export_blockers, unblock_export
from ...ir.facts import SkippedWhileDecoding
from ...ir.needs import ABSENT
from ...ir.option import option
from ...ir.program import Dial, Program
from ...ir.running.evaluate import needed_for
from ...ir.running.readers import readers
from ...ir.schema import arguments, is_operator
from ..framework.base import Pass
from ..framework.contracts import Approximate, Contract, ExactAt
from ..framework.plan import Plan, Refused, Site
from .checkpoint_layers import forget_removed
from .layer_scores import choose, remove_units, unified_rule, units_of

if TYPE_CHECKING:
    from ...measure.context import Context


PHASE = "decoding"
PHASED = "layers are skipped while decoding alone, which a configuration cannot say"
CHOSEN_BY_SCORE = {"layers": ABSENT, "speedup": ABSENT}


@dataclass(frozen=True, kw_only=True)
class SkipLayers(Pass):
    """Remove layers, attentions or feed-forwards.

    ``layers`` names them; ``remove`` says how many; ``speedup`` chooses by a rule without data (Unified Layer
    Skipping, arXiv 2404.06954: keep N / speedup layers, including the first and last, spread by the official
    rule); ``budget`` alone removes the largest number whose loss on judging data stays within it.

    Scores: ``block-influence`` is one minus the cosine between what a layer reads and writes (ShortGPT, arXiv
    2403.03853), ``angular`` the angle in half turns (arXiv 2403.17887), ``perplexity``, ``kl`` and ``cosine``
    what the whole model loses without the layer. ``one-shot`` removes the lowest-scored; ``greedy`` scores
    again after each removal; ``contiguous`` removes the best run of neighbours.

    ``phase=decode`` keeps the layers for prompts: a run-time setting ``decoding`` skips them for the tokens that
    follow, as in Unified Layer Skipping, and keys and values of the kept layers remain valid.
    """

    name = "skip-layers"
    contract = Approximate()
    paper = "arXiv 2404.06954, 2403.03853, 2403.17887"
    trial = {"layers": [0]}  # noqa: RUF012

    layers: list[int] | None = option(None, help="numbers of the layers to remove, from 0")  # noqa: RUF009
    remove: int | None = option(None, help="how many to remove, chosen by score", low=1)
    speedup: float | None = option(
        None, help="keep one layer in this many, by the unified rule", source="paper", low=1
    )
    budget: float | None = option(
        None, help="largest relative loss; alone: remove as many as it allows", low=0
    )
    unit: str = option("layer", help="what is removed", choices=("layer", "attention", "ffn"))
    score: str = option(
        "block-influence",
        help="score of a unit's importance",
        source="paper",
        choices=("block-influence", "angular", "perplexity", "kl", "cosine"),
        needs=CHOSEN_BY_SCORE,
    )
    search: str = option(
        "one-shot",
        help="how units are chosen",
        choices=("one-shot", "greedy", "contiguous"),
        needs=CHOSEN_BY_SCORE,
    )
    metric: str = option(
        "auto", help="what the loss is measured by", choices=("auto", "perplexity", "kl", "cosine")
    )
    phase: str = option(
        "always",
        help="when they are skipped: always, or decode, by a run-time setting: all layers read the prompt",
        choices=("always", "decode"),
    )

    def validate(self) -> None:
        """Require exactly one option that says what is removed."""
        selectors = [n for n in ("layers", "remove", "speedup") if getattr(self, n) is not None]
        if len(selectors) > 1:
            raise PipelineError(f"{self.name}: {' and '.join(selectors)} say the same thing twice; give one")
        if not selectors and self.budget is None:
            raise PipelineError(
                f"{self.name}: say what to remove", hint="layers=[3 4], remove=2, speedup=2 or budget=0.01"
            )
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise PipelineError(f"{self.name}: layers lists a number twice")

    def promises(self) -> Contract:
        """Return a contract judged by the given metric; with ``phase=decode`` the prompt is exact."""
        if self.phase == "decode":
            return ExactAt(PHASE, 0.0, judged_at=1.0, metric=self.metric)
        return Approximate(self.metric)

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the units, for ``phase=decode`` each with the stream after and before it, or why it cannot be skipped."""
        for number, unit in enumerate(units_of(program, self.unit)):
            stream = _stream_around(unit) if self.phase == "decode" else None
            if isinstance(stream, str):
                yield Refused(unit.name, stream, program.source_line(unit.term))
            else:
                yield Site(unit.name, number=number), stream

    def plan(self, program: Program, context: Context) -> Plan:
        """Score units and choose which to remove."""
        units = units_of(program, self.unit)
        names = [unit.name for unit in units]
        if len(units) < 2:
            count = f"there is {len(units)} {self.unit}" if units else f"there is no {self.unit}"
            raise PassRefusedError(
                f"{self.name}: {count} on the residual stream", hint="graphopt inspect shows its blocks"
            )
        findings = self.findings(program)
        plan = findings.plan()
        if self.layers is not None:
            chosen = self._listed(names)
        elif self.speedup is not None:
            kept_indices = unified_rule(len(names), self.speedup)
            chosen = [n for i, n in enumerate(names) if i not in kept_indices]
            plan.notes.append(f"kept by the unified rule: {sorted(kept_indices)}")
        else:
            chosen = choose(program, context, self, [u for u in units if u.name in findings.work], plan)
        if len(chosen) == len(names):
            raise PassRefusedError(f"{self.name}: nothing would be left", hint="remove fewer")
        chosen_sites = [site for site in plan.sites if site.block in chosen]
        second = self._second_of_one_addition([(site, findings.work[site.block]) for site in chosen_sites])
        plan.sites = [site for site in chosen_sites if site.block not in second]
        plan.refused += [Refused(name, reason) for name, reason in second.items()]
        refused = {r.block for r in plan.refused}
        for name in names:
            if name not in chosen and name not in refused:
                score = plan.scores.get(name)
                plan.refused.append(Refused(name, "kept" if score is None else f"kept: score {score:.4g}"))
        return plan

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return the same removal as commands of other tools, which remove layers for prompts as well."""
        if self.phase == "decode":
            return []
        names = [unit.name for unit in units_of(program, self.unit)]
        removed = [names.index(site.block) for site in plan.sites if site.block in names]
        return _other_tools(removed, len(names)) if self.unit == "layer" and removed else []

    def _second_of_one_addition(self, chosen: list[tuple[Site, Any]]) -> dict[str, str]:
        """Return, by name, why a unit cannot be skipped in addition to those before it."""
        if self.phase != "decode":
            return {}
        by_addition: dict[fx.Node, str] = {}
        names = [(site.block, by_addition.setdefault(stream[0], site.block)) for site, stream in chosen]
        return {
            n: f"nothing but {first}, which is skipped, is added with it" for n, first in names if n != first
        }

    def _listed(self, names: list[str]) -> list[str]:
        assert self.layers is not None
        wrong = [i for i in self.layers if not 0 <= i < len(names)]
        if wrong:
            raise PipelineError(
                f"{self.name}: there is no {self.unit} {wrong[0]}; they are numbered 0 to {len(names) - 1}"
            )
        return [names[i] for i in self.layers]

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Remove the planned units, or let a run-time setting skip them."""
        if not plan.sites:
            return
        chosen = self.chosen(program, plan)
        for name, reason in self._second_of_one_addition(chosen).items():
            raise PassRefusedError(f"the plan takes {name}, which cannot be taken: {reason}", node=name)
        if self.phase == "decode":
            _skip_while_decoding(program, [(site.block, *stream) for site, stream in chosen])
            return
        layers = units_of(program, self.unit)
        units = {unit.name: unit for unit in layers}
        removed = [units[site.block] for site, _ in chosen]
        before = {node for node in program.weight_nodes if readers(program, node)}
        indices = _names_by_layer(program, layers) if self.unit == "layer" else []
        remove_units(program, removed)
        forget_removed(
            program, before, indices, [layers.index(u) for u in removed], whole=self.unit == "layer"
        )

    @classmethod
    def dial_frozen(cls, program: Program, dial: str, value: float) -> None:
        """Let a program whose phase is frozen always run the layers, or always skip them."""
        if dial != PHASE:
            return
        for node in [n for n in program.nodes if is_operator(n, "graphopt.skipped")]:
            args = arguments(node)
            program.edit.replace(node, args["before"] if value >= 0.5 else args["after"], record=False)
        program.facts.discard(SkippedWhileDecoding)
        others = [r for r in export_blockers(program).get(cls.name, ()) if r != PHASED]
        unblock_export(program, cls.name)
        for reason in others:
            block_export(program, reason, by=cls.name)
        if value >= 0.5:
            block_export(
                program, "layers are skipped by a frozen setting; skip-layers without phase removes them"
            )


def _skip_while_decoding(program: Program, units: list[tuple[str, fx.Node, fx.Node]]) -> None:
    """Add a run-time setting that chooses between the stream after and before each unit, named first."""
    phase = program.add_dial(PHASE, Dial(0.0, 0.0, 1.0, "0 while a prompt is read, 1 while tokens are added"))
    replacements: dict[fx.Node, fx.Node] = {}
    for _, writes, reads in units:
        reads = replacements.get(reads, reads)
        users = list(writes.users)
        with program.edit.after(writes):
            stream = shaped_like(program, reads, writes)
            selected = program.edit.call(torch.ops.graphopt.skipped.default, stream, writes, phase)
        for user in users:
            user.replace_input_with(writes, selected)
            program.edit.touched[user] = None
        replacements[writes] = selected
    program.changed()
    program.facts.add(SkippedWhileDecoding(tuple(name for name, _, _ in units)))
    block_export(program, PHASED)


def _stream_around(unit: Any) -> tuple[fx.Node, fx.Node] | str:
    """Return the stream with a unit and without it, or why there is none without it."""
    if not getattr(unit, "parallel", False):
        return unit.writes, unit.reads
    # blocks side by side read and write one stream: what is passed over is this one's addition
    added = next(iter(unit.term.users))
    others = [n for n in added.all_input_nodes if n is not unit.term]
    if len(unit.term.users) != 1 or not is_operator(added, "aten.add") or len(others) != 1:
        return "it is not added to the stream apart from what is beside it"
    return added, others[0]


def _names_by_layer(program: Program, layers: list[Any]) -> list[set[str]]:
    """Return the names of the tensors that each layer reads."""
    by_node: dict[fx.Node, list[str]] = {}
    for name, node in program.checkpoint.items():
        by_node.setdefault(node, []).append(name)
    names_by_layer: list[set[str]] = []
    for layer in layers:
        names: set[str] = set()
        for block in layer.blocks:
            for node in [*block.nodes, *([layer.writes] if layer.writes not in block.nodes else [])]:
                for used in node.all_input_nodes:
                    if used.op == "placeholder":
                        names.update(by_node.get(used, ()))
                    elif used not in block.nodes and used.op == "call_function":
                        needed = needed_for([used], {layer.reads: None})
                        if all(n.op != "placeholder" or n.name in program.weights for n in needed):
                            names.update(x for n in needed for x in by_node.get(n, ()))
        names_by_layer.append(names)
    return names_by_layer


def _other_tools(removed: list[int], count: int) -> list[str]:
    """Return the same removal as options of llama.cpp and mergekit."""
    ranges, start = [], 0
    for number in [*sorted(removed), count]:
        if number > start:
            ranges.append(f"[{start}, {number}]")
        start = number + 1
    return [
        "llama.cpp: llama-quantize --prune-layers " + ",".join(map(str, sorted(removed))),
        "mergekit passthrough: layer_range " + ", ".join(ranges),
    ]
