"""Mask tokens at which a decoder predicts tokens after the next one, with weights that apply at these positions alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.anatomy.residual import between
from ...ir.export_blockers import block_export
from ...ir.facts import KVCache, MaskTokens
from ...ir.inputs import add_input
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import computed
from ...ir.schema import arguments, is_operator
from ...ir.weights import InMemory, TensorSource, Uniform, Zeros
from ..framework.base import Pass
from ..framework.contracts import AddsOutputs
from ..framework.plan import Plan, Refused, Site
from .logits import Head, dtype_of, find_head, layers_to_logits, repeat_path, token_embedding, value_size

aten, composites = torch.ops.aten, torch.ops.graphopt
PREFIX = "mask_tokens"
MIXERS = ("attention", "mixer")


@dataclass(frozen=True, kw_only=True)
class AttachMaskTokens(Pass):
    """Add mask tokens with gated LoRA and a sampler (arXiv 2507.11851): mask j predicts the token j + 1 positions ahead.

    Input ``mask_index`` (batch, sequence): 0 at tokens of the text, j at mask token j; by default all are text. At
    mask tokens alone, linears of the layers become ``W x + alpha / rank * B A x``. ``mask_hidden`` (batch, sequence,
    size) is the input of the head. From it and the preceding token in ``sampler_ids`` (batch, sequence), the sampler
    computes ``mask_logits`` (batch, sequence, vocabulary). B is initialised with zeros, mask tokens with the mean of
    the vocabulary, and the sampler as the model's own head. Train with the recipe ``mask-tokens``, after
    insert-cache{tree=true}.
    """

    name = "attach-mask-tokens"
    contract = AddsOutputs()
    together = True
    paper = "arXiv 2507.11851"
    provides = (MaskTokens,)
    excludes = (MaskTokens, KVCache)

    masks: int = option(3, help="how many tokens after the next are predicted", low=1, high=16)
    rank: int = option(128, help="of each LoRA", source="paper", low=1)
    alpha: float | None = option(
        None, help="weight of what LoRA adds, times the rank; twice the rank if not given"
    )
    on: str = option(
        "all", help="linears that get a LoRA", choices=("all", "attention", "feed-forward"), source="code"
    )
    residual: bool = option(
        True,
        help="the sampler adds to the hidden state, and begins as the model's head; without, it is as published",
    )
    seed: int = option(0, help="of what is drawn")

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the linears of the layers, or why the program takes no mask tokens."""
        head = find_head(program)
        table = token_embedding(program)
        reason = head if isinstance(head, str) else ""
        if not reason and table is None:
            reason = "its tokens are not looked up in an embedding table"
        if not reason and table is not None and table.meta["val"].shape[-1] != value_size(head.hidden):  # type: ignore[union-attr]
            reason = "its tokens have vectors of another size than its hidden states"
        if reason:
            yield Refused("head", reason)
            return
        linears = self._linears(program)
        for node, why in linears:
            if why:
                yield Refused(node.name, why, program.source_line(node))
            else:
                yield Site(node.name, rank=self.rank), node
        if not linears:
            yield Refused("layers", "no linear was recognised in its layers")

    def _linears(self, program: Program) -> list[tuple[fx.Node, str]]:
        """Return the linears of layers, each with why it cannot have a LoRA, or an empty string."""
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        linears: dict[fx.Node, str] = {}
        for layer in layers_to_logits(program):
            for block in layer.blocks:
                mixes = block.kind in MIXERS
                if self.on != "all" and mixes != (self.on == "attention"):
                    continue
                for node in between(block.reads, block.writes, order):
                    if is_operator(node, "aten.linear"):
                        value = arguments(node)["input"].meta["val"]
                        linears[node] = "" if value.dim() == 3 else "its rows are not (batch, sequence, size)"
        return list(linears.items())

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Add mask embeddings, LoRA on the linears, and the sampler beside the head."""
        if not plan.sites:
            return
        chosen = self.chosen(program, plan)
        table = token_embedding(program)
        assert table is not None
        tokens = table.args[1]
        assert isinstance(tokens, fx.Node)
        shape, like = list(tokens.meta["val"].shape), str(tokens.meta["input"])
        marks = add_input(program, "mask_index", shape, torch.int64, fill=("marks", like))
        edit = program.edit
        scale = (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank
        for number, (site, linear) in enumerate(chosen):
            self._add(program, linear, marks, int(site["rank"]), scale, self.seed + number)
        size = int(table.meta["val"].shape[-1])
        weight = edit.add_weight(
            f"{PREFIX}.embeddings", _MeanOfRows(_source(program, arguments(table)["weight"]), self.masks)
        )
        with edit.after(table):
            marked = edit.call(composites.marked_embedding.default, table, weight, marks)
        edit.replace(table, marked)
        self._sampler(program, table, tokens, size)
        program.facts.add(MaskTokens(self.masks, self.rank))
        block_export(program, "a folder has no place for mask tokens; write it before attach-mask-tokens")

    def _add(
        self, program: Program, linear: fx.Node, marks: fx.Node, rank: int, scale: float, seed: int
    ) -> None:  # fmt: skip
        args = arguments(linear)
        x, weight = args["input"], args["weight"]
        out, inner = (int(s) for s in weight.meta["val"].shape)
        stored = program.weights.get(weight.name)
        name = f"{PREFIX}.lora.{stored.name if stored is not None else linear.name}"
        dtype = dtype_of(linear)
        # several linears may share a weight (shared layers), and each has its own LoRA
        used = {w.name for w in program.weights.values()}
        if f"{name}.down" in used:
            name = f"{name}.{linear.name}"
        edit = program.edit
        down = edit.add_weight(f"{name}.down", Uniform((rank, inner), dtype, 1 / math.sqrt(inner), seed))
        up = edit.add_weight(f"{name}.up", Zeros((out, rank), dtype))
        with edit.after(linear):
            replacement = edit.call(composites.gated_lora.default, linear, x, down, up, marks, scale)
        edit.replace(linear, replacement)

    def _sampler(self, program: Program, table: fx.Node, tokens: fx.Node, size: int) -> None:
        head, edit = find_head(program), program.edit
        assert isinstance(head, Head)
        dtype = dtype_of(head.hidden)
        before = add_input(
            program, "sampler_ids", list(tokens.meta["val"].shape), tokens.meta["val"].dtype,
            fill=("following", str(tokens.meta["input"])),
        )  # fmt: skip
        unit, zeros = InMemory(torch.ones(size, dtype=dtype)), Zeros((size,), dtype)
        initial: dict[str, TensorSource] = {
            "input.weight": Uniform((size, 2 * size), dtype, 1 / math.sqrt(2 * size), self.seed + 1),
            "input.norm.weight": unit, "input.norm.bias": zeros,
            "hidden.weight": Uniform((size, size), dtype, 1 / math.sqrt(size), self.seed + 2),
            "hidden.norm.weight": zeros if self.residual else unit, "hidden.norm.bias": zeros,
        }  # fmt: skip
        weights = {n: edit.add_weight(f"{PREFIX}.sampler.{n}", source) for n, source in initial.items()}

        def layer(value: fx.Node, name: str) -> fx.Node:
            hidden = edit.call(
                aten.silu.default, edit.call(aten.linear.default, value, weights[f"{name}.weight"])
            )
            return edit.call(
                aten.layer_norm.default,
                hidden,
                [size],
                weights[f"{name}.norm.weight"],
                weights[f"{name}.norm.bias"],
                1e-5,
            )

        with edit.after(head.path[-1]):
            embedded = edit.call(aten.embedding.default, table.args[0], before)
            joined = edit.call(aten.cat.default, [embedded, head.hidden], -1)
            value = layer(layer(joined, "input"), "hidden")
            if self.residual:
                value = edit.call(aten.add.Tensor, head.hidden, value)
            outputs = {head.hidden: value}
            repeat_path(program, head.path, outputs)
        program.add_output("mask_hidden", head.hidden)
        program.add_output("mask_logits", outputs[head.logits])


@dataclass(frozen=True)
class _MeanOfRows:
    """The mean row of a table, repeated; computed when it is loaded."""

    table: TensorSource
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, self.table.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def load(self) -> torch.Tensor:
        mean = self.table.load().mean(0, keepdim=True, dtype=torch.float32)
        return mean.to(self.dtype).repeat(self.count, 1)


def _source(program: Program, node: fx.Node) -> TensorSource:
    return program.weights[node.name].source if node.op == "placeholder" else computed(program, node)[0]
