"""Faults planted in rules and in graphs: each is caught, and what was there before is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from builders import D, Shape, Transformer, tokens
from torch import fx, nn

import graphopt
from graphopt.ir.anatomy import Block
from graphopt.ir.program import Program
from graphopt.ir.schema import argument, is_operator, set_argument
from graphopt.ir.weights import InMemory
from graphopt.measure.context import Context
from graphopt.passes import Exact, FoldNorms, FuseProjections, Pass, Plan, Site, SplitProjections
from graphopt.passes.framework.manager import run_pipeline
from graphopt.passes.projections import fold_norms, fuse_projections, scale_columns
from graphopt.passes.shared import fused_projections

aten = torch.ops.aten
Fault = Callable[[Program], None]
GRAPH_FAULTS: dict[str, tuple[Fault, str]] = {}


class Both(nn.Module):
    """The hand-written transformer, which gives its last state as well, with a window of 12 and a cap."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer(Shape(layers=2, bias=True, tied=True, kv_heads=2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = nn.functional.embedding(input_ids, self.inner.table)
        for block in self.inner.blocks:
            x = block(x, attention_mask)
        first = self.inner.last(x)
        return {"states": first, "logits": first @ self.inner.head.T, "other": torch.tanh(first)}


@lru_cache(maxsize=1)
def program() -> Program:
    found = graphopt.capture(Both(), tokens(2, 6))
    for node in found.nodes:
        if is_operator(node, "graphopt.attention"):
            set_argument(node, "window", 12)
            set_argument(node, "softcap", 5.0)
    found.changed()
    return found


def fault(message: str = "differs from") -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        GRAPH_FAULTS[function.__name__] = (function, message)
        return function

    return register


def first(p: Program, name: str, skip: int = 0) -> fx.Node:
    return [n for n in p.graph.nodes if is_operator(n, name)][skip]


def reweigh(p: Program, node: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = p.weights[node.name]
    p.weights[node.name] = weight.with_source(InMemory(change(weight.source.load().clone())))


def block(p: Program, kind: str, index: int = 0) -> Block:
    return p.anatomy.of(kind)[index]


@fault()
def a_wrong_rule(p: Program) -> None:
    p.replace(first(p, "aten.silu"), lambda x: x * torch.sigmoid(x * 1.000001))


@fault()
def a_lost_bias(p: Program) -> None:
    node = first(p, "aten.linear")
    p.replace(node, torch.nn.functional.linear, *node.args[:2])


@fault()
def keys_for_values(p: Program) -> None:
    parts = block(p, "attention").parts
    pair = [parts[name].args[1] for name in ("v", "k")]
    for name, weight in zip(("k", "v"), pair, strict=True):
        set_argument(parts[name], "weight", weight)


@fault("recorded value")
def a_stale_shape(p: Program) -> None:
    node = first(p, "aten.permute")
    set_argument(node, "dims", [0, 1, 2, 3])


@fault("does not accept")
def slices_that_do_not_fit(p: Program) -> None:
    node = block(p, "ffn").parts["down"]
    with p.edit.before(node):
        set_argument(node, "input", p.edit.call(aten.slice.Tensor, node.args[0], 2, 0, 7))


@fault("cannot stand for")
def a_value_of_another_type(p: Program) -> None:
    p.replace(first(p, "aten.silu"), lambda x: torch.nn.functional.silu(x).to(torch.float32))


@fault("rounds to torch.bfloat16")
def a_hidden_rounding(p: Program) -> None:
    p.replace(first(p, "aten.silu"), lambda x: torch.nn.functional.silu(x.to(torch.bfloat16).to(D)))


@fault()
def a_leaked_value(p: Program) -> None:
    norm = first(p, "graphopt.rms_norm")
    reader = block(p, "attention").parts["q"]
    weight = argument(norm, "weight")
    with p.edit.before(norm):
        bare = p.edit.call(norm.target, norm.args[0], None, norm.args[2])
    with p.edit.before(reader):
        set_argument(reader, "weight", p.edit.call(aten.mul.Tensor, reader.args[1], weight))
    p.edit.replace(norm, bare)  # k and v read it too


@fault()
def a_tied_weight_scaled_for_one_of_its_readers(p: Program) -> None:
    head = p.anatomy.head[-1]
    scale = p.weights[argument(head.args[0], "weight").name].source.load()
    set_argument(head.args[0], "weight", None)
    reweigh(p, head.args[1], lambda w: w * scale)


@fault("writes in place")
def a_write_in_place(p: Program) -> None:
    node = first(p, "aten.silu")
    with p.edit.before(node):
        p.edit.call(aten.mul_.Tensor, node.args[0], 2.0)


@fault("written to in place")
def a_weight_written_to(p: Program) -> None:
    weight = p.weights[block(p, "ffn").parts["up"].args[1].name].source.load()
    weight.mul_(1.0)


@fault()
def padding_ignored(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "key_mask", None)


@fault()
def causality_lost(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "causal", False)


@fault()
def a_window_off_by_one(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "window", 11)


@fault()
def a_cap_lost(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "softcap", None)


@fault()
def heads_grouped_off_by_one(p: Program) -> None:
    core = first(p, "graphopt.attention")
    with p.edit.before(core):
        set_argument(core, "k", p.edit.call(aten.roll.default, argument(core, "k"), [1], [1]))


@fault()
def another_epsilon(p: Program) -> None:
    set_argument(first(p, "graphopt.rms_norm", 1), "eps", 1.1e-5)


@fault()
def a_dropped_residual(p: Program) -> None:
    ffn = block(p, "ffn", 1)
    p.bypass(ffn.writes, with_=ffn.term)


@fault()
def one_row_off_in_the_last_layer(p: Program) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3] *= 1 + 1e-6
        return tensor

    # every layer gets a new source, so that all sites look alike; one is wrong
    for index in (0, 1):
        reweigh(p, block(p, "ffn", index).parts["up"].args[1], change if index else torch.clone)


@fault()
def one_row_off_in_a_new_weight(p: Program) -> None:
    for index in (0, 1):
        up = block(p, "ffn", index).parts["up"]
        tensor = p.weights[up.args[1].name].source.load().clone()
        tensor[2] *= 1 + index * 1e-6
        set_argument(up, "weight", p.edit.add_weight(f"copy.{index}", tensor))


@fault()
def the_source_of_another_weight(p: Program) -> None:
    names = [block(p, "attention", i).parts["o"].args[1].name for i in (0, 1)]
    p.weights[names[0]] = p.weights[names[0]].with_source(p.weights[names[1]].source)


@fault()
def a_transposed_matrix(p: Program) -> None:
    node = block(p, "ffn").parts["down"]
    with p.edit.before(node):
        turned = p.edit.emit(lambda w: w.T.reshape(w.shape), node.args[1])
    set_argument(node, "weight", turned)


@fault()
def outputs_in_another_order(p: Program) -> None:
    values = p.outputs
    p.edit.set_outputs([values["other"], values["logits"], values["states"]])


@fault("no longer returns states")
def an_output_lost(p: Program) -> None:
    values = p.outputs
    del p.signature.outputs["dict"]["states"]
    p.edit.set_outputs([values["logits"], values["other"]])


@fault("not defined before it")
def nodes_out_of_order(p: Program) -> None:
    first(p, "aten.silu", 0).prepend(first(p, "aten.silu", 1))


@fault()
def rotation_in_pairs(p: Program) -> None:
    set_argument(first(p, "graphopt.rotary"), "interleaved", True)


@fault("computes the checkpoint")
def the_way_back_erased(p: Program) -> None:
    p.checkpoint["gone"] = fx.Graph().placeholder("nowhere")


@dataclass(frozen=True, kw_only=True)
class Faulty(Pass):
    """Promise exactness and break it."""

    name = "faulty"
    contract = Exact()
    fault = ""

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan([Site("everything")])

    def rewrite(self, program: Program, plan: Plan) -> None:
        GRAPH_FAULTS[self.fault][0](program)


def unchanged(step: Pass, message: str) -> None:
    """Run a pass that must fail with this message, and check that the program is what it was."""
    p = program()
    before, sources = p.text(), {name: weight.source for name, weight in p.weights.items()}
    facts, history, keys = p.facts.copy(), list(p.history), dict(p.checkpoint)
    outputs = str(p.signature.outputs)
    with pytest.raises((graphopt.ContractError, graphopt.VerificationError), match=message):
        run_pipeline(p, [step], Context())
    assert p.text() == before
    assert all(p.weights[name].source is source for name, source in sources.items())
    assert (p.facts, p.history, p.checkpoint, str(p.signature.outputs)) == (facts, history, keys, outputs)


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_a_fault_in_a_graph_is_caught_and_rolled_back(name: str) -> None:
    """Wrong if this fault could reach a user as an exact rewrite."""
    planted = type("Planted", (Faulty,), {"fault": name, "__doc__": Faulty.__doc__})
    unchanged(planted(), GRAPH_FAULTS[name][1])


def _without_bias(members: list[fx.Node]) -> list[None]:
    return [None for _ in members]


def _swapped_parts(*given: Any) -> list[fx.Node]:
    parts = ORIGINAL["_split"](*given)
    return [*parts[:-2], parts[-1], parts[-2]]


def _plain_join(p: Program, tensors: list[Any], groups: int) -> fx.Node:
    return ORIGINAL["_join"](p, tensors, 1)


def _shifted_rows(p: Program, tensor: Any, piece: Any, columns: int) -> fx.Node:
    steps = [
        ("slice", s[1], s[2] - 1, s[3] - 1, *s[4:]) if s[0] == "slice" and s[2] else s for s in piece.steps
    ]
    return ORIGINAL["_rows"](p, tensor, replace(piece, steps=steps), columns)


def _scaled_twice(p: Program, matrix: fx.Node, scale: fx.Node, axis: int) -> fx.Node:
    return ORIGINAL["scaled_matrix"](p, ORIGINAL["scaled_matrix"](p, matrix, scale, axis), scale, axis)


def _bias_lost(p: Program, reader: Any, bare: Any, weight: Any, bias: Any) -> None:
    ORIGINAL["scale_reader"](p, reader, bare, weight, None)


ORIGINAL: dict[str, Any] = {
    "_split": fuse_projections._split,
    "_join": fuse_projections._join,
    "_rows": fused_projections._rows,
    "scaled_matrix": scale_columns.scaled_matrix,
    "scale_reader": fold_norms.scale_reader,
}
RULE_FAULTS: list[tuple[str, Any, str, Any, Pass, Shape]] = [
    ("biases forgotten", fuse_projections, "_biases", _without_bias, FuseProjections(), Shape(layers=1, bias=True)),
    ("keys for values", fuse_projections, "_split", _swapped_parts, FuseProjections(), Shape(layers=1)),
    (
        "rows joined in another layout", fuse_projections, "_join", _plain_join,
        FuseProjections(layout="grouped"), Shape(layers=1),
    ),
    (
        "rows cut off by one", fused_projections, "_rows", _shifted_rows,
        SplitProjections(), Shape(layers=1, qkv="plain"),
    ),
    ("a scale folded twice", scale_columns, "scaled_matrix", _scaled_twice, FoldNorms(), Shape(layers=1)),
    ("a norm's bias lost", fold_norms, "scale_reader", _bias_lost, FoldNorms(), Shape(layers=1, norm="layer")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "wrong", "step", "shape"),
    [f[1:] for f in RULE_FAULTS],
    ids=[f[0] for f in RULE_FAULTS],
)
def test_a_fault_in_a_rule_of_a_pass_is_caught(
    module: Any, name: str, wrong: Any, step: Pass, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if a mistake in one of the passes themselves could pass its own contract."""
    given = graphopt.capture(Transformer(shape), tokens(2, 6))
    before = given.text()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((graphopt.ContractError, graphopt.VerificationError)):
        run_pipeline(given, [step], Context())
    assert given.text() == before
    monkeypatch.undo()
    run_pipeline(given, [step], Context())
