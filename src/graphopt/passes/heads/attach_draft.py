"""A draft of one layer that reads the model's hidden states (after EAGLE-3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.anatomy.residual import between
from ...ir.anatomy.rows import shaped_like
from ...ir.errors import PassRefusedError
from ...ir.export_blockers import block_export
from ...ir.facts import AttachedDraft
from ...ir.inputs import add_input
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.running.fold import depends_on_weights_alone
from ...ir.weights import InMemory
from ..framework.base import Pass
from ..framework.contracts import AddsOutputs
from ..framework.plan import Plan, Refused, Site
from .logits import Head, dtype_of, find_head, layers_to_logits, repeat_path, token_embedding, value_size

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten
PREFIX = "draft"
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AttachDraft(Pass):
    """Add a draft: the stream at three depths and the next token's embedding pass through an extra layer and the head.

    Input ``draft_ids`` (batch, sequence): the token that follows each token; by default the text's own. Outputs:
    ``draft_features`` (batch, sequence, size), the three depths joined; ``draft_hidden`` of the same shape, the
    output of the draft's layer, which replaces the features for the token after; ``draft_logits`` (batch, sequence,
    vocabulary), for the token two positions ahead. The layer is initialised as a copy of one of the model's;
    embedding, final norm and head are the model's. Train with the recipe ``draft``.
    """

    name = "attach-draft"
    contract = AddsOutputs()
    together = True
    paper = "arXiv 2503.01840"
    provides = (AttachedDraft,)
    excludes = (AttachedDraft,)

    taps: list[int] | None = option(  # noqa: RUF009
        None,
        help="layers after which the stream is read, from 0; one low, one in the middle, one high if not given",
    )
    layer: int | None = option(None, help="the layer that is copied; the last if not given", low=0)

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the layers, the embedding and the head."""
        plan = Plan()
        head, layers = find_head(program), layers_to_logits(program)
        reason = head if isinstance(head, str) else ""
        if not reason and len(layers) < 2:
            reason = f"{len(layers)} layers were recognised"
        if not reason and any(layer.writes.meta["val"].dim() > 3 for layer in layers):
            reason = "its stream has several copies, of which none is what a draft would read"
        if not reason and token_embedding(program) is None:
            reason = "its tokens are not looked up in an embedding table"
        if reason:
            plan.refused.append(Refused("head", reason, ""))
            return plan
        count = len(layers)
        taps = self.taps if self.taps is not None else [count // 4, count // 2, count - 1]
        copied = self.layer if self.layer is not None else count - 1
        wrong = [n for n in (*taps, copied) if not 0 <= n < count]
        if wrong or not taps:
            raise PassRefusedError(
                f"{self.name}: {f'there is no layer {wrong[0]}' if wrong else 'no taps'}; they are 0 to {count - 1}"
            )
        plan.sites.append(Site(layers[copied].name, taps=list(taps), layer=copied))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Build the draft after the logits."""
        for site in plan.sites:
            self._build(program, [int(t) for t in site["taps"]], int(site["layer"]))

    def _build(self, program: Program, taps: list[int], number: int) -> None:
        head, table = find_head(program), token_embedding(program)
        assert isinstance(head, Head)
        assert table is not None
        layers, call = layers_to_logits(program), program.edit.call
        layer = layers[number]
        size, dtype = value_size(layer.writes), dtype_of(layer.writes)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        path = between(layer.reads, layer.writes, order)
        tokens = table.args[1]
        assert isinstance(tokens, fx.Node)
        following = add_input(
            program, "draft_ids", list(tokens.meta["val"].shape), tokens.meta["val"].dtype,
            fill=("following", str(tokens.meta["input"])),
        )  # fmt: skip
        eye = torch.eye(size, dtype=dtype)
        initial = {
            "features": torch.cat([*(torch.zeros(size, size, dtype=dtype) for _ in taps[1:]), eye], 1),
            "input": torch.cat([eye, eye], 1),
            "embedding_norm": torch.ones(size, dtype=dtype),
            "features_norm": torch.ones(size, dtype=dtype),
        }
        weights = {
            n: program.edit.add_weight(f"{PREFIX}.{n}.weight", InMemory(t)) for n, t in initial.items()
        }
        now: dict[fx.Node, fx.Node] = {}
        stored = _stored(program, path)
        for used in stored:
            if used in program.weight_nodes and program.weights[used.name].kind == "parameter":
                weight = program.weights[used.name]
                now[used] = program.edit.add_weight(f"{PREFIX}.layer.{weight.name}", weight.source)
        with program.edit.after(head.path[-1]):
            repeat_path(program, stored, now)
            streams = [shaped_like(program, layers[t].writes, table) for t in taps]
            features = call(aten.linear.default, call(aten.cat.default, streams, -1), weights["features"])
            embedded = call(aten.embedding.default, table.args[0], following)
            norm = torch.ops.graphopt.rms_norm.default
            joined = call(
                aten.cat.default,
                [
                    call(norm, embedded, weights["embedding_norm"], EPSILON),
                    call(norm, features, weights["features_norm"], EPSILON),
                ],
                -1,
            )
            begin = call(aten.linear.default, joined, weights["input"])
            now[layer.reads] = shaped_like(program, begin, layer.reads)
            repeat_path(program, path, now)
            hidden = shaped_like(program, now[layer.writes], table)
            outputs = {head.stream: shaped_like(program, hidden, head.stream)}
            repeat_path(program, head.path, outputs)
        for name, value in (
            ("draft_features", features), ("draft_hidden", hidden), ("draft_logits", outputs[head.logits])
        ):  # fmt: skip
            program.add_output(name, value)
        program.facts.add(AttachedDraft(tuple(taps), number))
        block_export(program, "a folder has no place for a draft; write it before attach-draft")


def _stored(program: Program, path: list[fx.Node]) -> list[fx.Node]:
    """Return the weights that a path reads and what is made of them alone, in order.

    A matrix that is stored input first is transposed before it is read, and is the layer's own all the same.
    """
    constant = depends_on_weights_alone(program)
    needed = needed_for([n for node in path for n in node.all_input_nodes if n in constant], {})
    return [node for node in program.graph.nodes if node in needed]
