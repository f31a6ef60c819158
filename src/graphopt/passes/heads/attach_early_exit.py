"""Logits of a decoder after some of its layers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.errors import PassRefusedError
from ...ir.export_blockers import block_export
from ...ir.facts import EarlyExits, KVCache, QuantizedCache, SkippedWhileDecoding
from ...ir.infer import same_size
from ...ir.inputs import remove_input
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.running.extract import extract
from ...ir.schema import is_operator
from ..framework.base import Pass
from ..framework.contracts import AddsOutputs
from ..framework.plan import Plan, Refused, Site
from .logits import find_head, layers_to_logits, repeat_path

if TYPE_CHECKING:
    from ...ir.anatomy import Block, Layer
    from ...measure.context import Context

OUTPUT = "exit_logits"


@dataclass(frozen=True, kw_only=True)
class AttachEarlyExit(Pass):
    """Read the residual stream after a layer through the final norm and head, as one more output.

    Adds ``exit_logits`` (batch, sequence, vocabulary), or ``exit_logits_3``, ``exit_logits_7`` for several layers. No
    weights are added. Decoding uses an exit as a draft: the first layers propose, all layers verify, and both share
    one cache.
    """

    name = "attach-early-exit"
    contract = AddsOutputs()
    paper = "arXiv 2404.16710, 2504.05598"
    provides = (EarlyExits,)
    excludes = (EarlyExits,)
    trial = {"layers": [0]}  # noqa: RUF012

    layers: list[int] | None = option(  # noqa: RUF009
        None,
        help="numbers of the layers after which the stream is read, from 0; a third of the way if not given",
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the layers and the head."""
        plan = Plan()
        head = find_head(program)
        layers = layers_to_logits(program)
        if isinstance(head, str):
            plan.refused.append(Refused("head", head, ""))
            return plan
        positions = self.layers if self.layers is not None else [max(0, len(layers) // 3 - 1)]
        wrong = [n for n in positions if not 0 <= n < len(layers) - 1]
        if wrong or len(set(positions)) != len(positions):
            raise PassRefusedError(
                f"{self.name}: {'layer ' + str(wrong[0]) if wrong else 'a layer twice'}; "
                f"exits lie after different layers from 0 to {len(layers) - 2}"
            )
        for number in sorted(positions):
            name = OUTPUT if len(positions) == 1 else f"{OUTPUT}_{number}"
            plan.sites.append(Site(layers[number].name, layer=number, output=name))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Copy the operators between the stream and the logits for each exit."""
        head = find_head(program)
        layers = layers_to_logits(program)
        for site in plan.sites:
            assert not isinstance(head, str)
            copies: dict[fx.Node, fx.Node] = {head.stream: layers[int(site["layer"])].writes}
            with program.edit.after(head.path[-1]):
                repeat_path(program, head.path, copies)
            program.add_output(str(site["output"]), copies[head.logits])
        if plan.sites:
            program.facts.add(EarlyExits({str(s["output"]): int(s["layer"]) for s in plan.sites}))
            block_export(program, "a checkpoint names no exits; write it before attach-early-exit")


def split_at(program: Program, layer: int) -> tuple[Program, Program]:
    """Return programs of the layers up to one and of those after it; run in order they compute the same bits.

    If the program has a cache, each half has the caches of its own layers as inputs and outputs, under their names in
    the whole program; positions, slots and masks are inputs of both.

    Args:
        program: a decoder.
        layer: number of the last layer of the first half.

    Returns:
        A program with the output ``hidden`` (batch, sequence, size) and any other outputs computed by then, and one
        that takes ``hidden`` with the other inputs and has the remaining outputs.

    Raises:
        PassRefusedError: there is no such layer, none after it, or layers after it read more than the stream.
    """
    layers = layers_to_logits(program)
    if not 0 <= layer < len(layers) - 1:
        raise PassRefusedError(
            f"a program of {len(layers)} layers is split after one from 0 to {len(layers) - 2}"
        )
    value = layers[layer].writes
    early, late = (
        {node for entry in side for block in entry.blocks for node in block.nodes}
        for side in (layers[: layer + 1], layers[layer + 1 :])
    )
    late_outputs = {n: node for n, node in program.outputs.items() if needed_for([node], {}) & late}
    ahead = {n: node for n, node in program.outputs.items() if n not in late_outputs}
    needed = needed_for(late_outputs.values(), {value: None})
    if crossing := [n for n in program.graph.nodes if n in needed and n in early]:
        raise PassRefusedError(
            f"layers after layer {layer} read more of the layers before than the stream: {crossing[-1].name}",
            hint="split after another layer",
        )
    first = extract(program, {}, {"hidden": value, **ahead})
    second = extract(_on_caches_of(program, late_outputs), {"hidden": value}, late_outputs)
    _sizes_from(second, "hidden")
    for part, ends, before in ((first, {"logits": "hidden"}, 0), (second, {"tokens": "hidden"}, layer + 1)):
        _own_facts(part, ends, before)
    return first, second


def _on_caches_of(program: Program, outputs: dict[str, fx.Node]) -> Program:
    """Return the program with the cache capacity read from a cache that these outputs need."""
    caches = {n: node for n, node in program.input_nodes.items() if f"next_{n}" in program.outputs}
    cache_node = next((node for n, node in caches.items() if f"next_{n}" in outputs), None)
    if cache_node is None:
        return program
    copy = program.copy()
    nodes = {n.name: n for n in copy.graph.nodes}
    source = nodes[cache_node.name]
    for cache in caches.values():
        for user in list(nodes[cache.name].users):
            if is_operator(user, "graphopt.cache_visible") or is_operator(user, "aten.sym_size"):
                user.replace_input_with(nodes[cache.name], source)
    copy.changed()
    return copy


def _sizes_from(half: Program, name: str) -> None:
    """Read sizes from one input instead of inputs that are only read for their sizes, and remove those."""
    placeholder = half.input_nodes[name]
    for other, node in half.input_nodes.items():
        if (
            node is placeholder
            or not node.users
            or not all(is_operator(u, "aten.sym_size") for u in node.users)
        ):
            continue
        for user in list(node.users):
            sizes = [same_size(size, user.meta["val"]) for size in placeholder.meta["val"].shape]
            if any(sizes):
                user.args = (placeholder, sizes.index(True))
        # an optional input that is filled in like another one needs that one
        if not node.users and all(
            s.fill is None or s.fill.like != other for s in half.signature.inputs.values()
        ):
            remove_input(half, other)
    half.changed()


def _own_facts(half: Program, ends: dict[str, str], before: int) -> None:
    """Adjust the facts of a half to its own layers, whose first has the number ``before`` in the whole program."""
    cache = half.facts.get(KVCache)
    if cache is not None:
        keys = [n for n in half.signature.inputs if re.fullmatch(r"key_cache_\d+", n)]
        updated = replace(cache, layers=len(keys))
        half.facts.add(
            replace(
                updated, tokens=ends.get("tokens", updated.tokens), logits=ends.get("logits", updated.logits)
            )
        )
    coded = half.facts.get(QuantizedCache)
    if coded is not None:
        half.facts.add(replace(coded, caches=tuple(n for n in coded.caches if n in half.signature.inputs)))
    attached = half.facts.get(EarlyExits)
    half.facts.discard(EarlyExits)
    exits = {n: i - before for n, i in (attached.layers if attached else {}).items() if n in half.outputs}
    if exits:
        half.facts.add(EarlyExits(exits))
    decoding = half.facts.get(SkippedWhileDecoding)
    if decoding is not None:
        half.facts.discard(SkippedWhileDecoding)
        kinds = {name.split(".")[0] for name in decoding.names}
        skipped = {n.args[1] for n in half.nodes if is_operator(n, "graphopt.skipped")}
        units: list[Layer | Block] = [*half.anatomy.layers, *half.anatomy.blocks]
        names = [u.name for u in units if u.writes in skipped and u.name.split(".")[0] in kinds]
        if names:
            half.facts.add(SkippedWhileDecoding(tuple(names)))


def exit_quality(program: Program, batch: dict[str, torch.Tensor]) -> list[float]:
    """Return, for each layer but the last, how often its exit's most likely token is the program's.

    Args:
        program: a decoder without exits.
        batch: inputs by name.

    Raises:
        PassRefusedError: it has no head that could be applied to a layer.
    """
    from ...ir.running.execute import interpret

    count = len(layers_to_logits(program))
    if count < 2:
        return []
    copy = program.copy()
    step = AttachEarlyExit(layers=list(range(count - 1)))
    plan = step.plan(copy, None)  # type: ignore[arg-type]
    if not plan.sites:
        raise PassRefusedError(f"no exit: {plan.refused[0].reason}")
    step.rewrite(copy, plan)
    values = interpret(copy, copy.bind((), batch))
    mask = batch.get("attention_mask")
    counted = torch.ones(values["logits"].shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    best = values["logits"].argmax(-1)
    return [float((values[str(s["output"])].argmax(-1) == best)[counted].float().mean()) for s in plan.sites]
