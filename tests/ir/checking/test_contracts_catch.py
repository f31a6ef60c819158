"""Faults planted on purpose, one rule broken at a time: each is caught before its result counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import zoo
from torch import fx

import graphopt
from graphopt import ContractError, VerificationError
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator, set_argument
from graphopt.ir.weights import InMemory
from graphopt.measure.context import Context
from graphopt.passes import Exact, Pass, Plan, Site
from graphopt.passes.framework.manager import run_pipeline

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    return graphopt.capture(zoo.make("llama_tied"), {"input_ids": ids})


def first(program: Program, name: str, skip: int = 0) -> fx.Node:
    return [n for n in program.graph.nodes if is_operator(n, name)][skip]


def scaled_rule(p: Program) -> None:
    p.replace(first(p, "aten.silu"), lambda x: torch.sigmoid(x) * x * 1.0001)


def lost_bias(p: Program) -> None:
    node = first(p, "aten.linear")
    p.replace(node, lambda x, w: torch.nn.functional.linear(x, w) + 0.01)


def swapped_keys_and_values(p: Program) -> None:
    block = p.anatomy.attention[0]
    k, v = block.parts["k"], block.parts["v"]
    k_weight, v_weight = k.args[1], v.args[1]
    set_argument(k, "weight", v_weight)
    set_argument(v, "weight", k_weight)


def stale_shape(p: Program) -> None:
    node = first(p, "aten.silu")
    node.meta["val"] = p.fake((3, 4), torch.float32)
    p.edit.touched[node] = None


def wrong_shape(p: Program) -> None:
    node = first(p, "aten.silu")
    with p.edit.before(node):
        new = p.edit.emit(lambda x: x[..., :8], node.args[0])
    p.edit.replace(node, new)


def tied_weight_changed_once(p: Program) -> None:
    head = p.anatomy.head[-1]
    with p.edit.before(head):
        weight = p.edit.call(aten.mul.Tensor, head.args[1], 1.01)
        new = p.edit.call(aten.linear.default, head.args[0], weight)
    p.edit.replace(head, new)


def in_place_operator(p: Program) -> None:
    node = first(p, "aten.silu")
    with p.edit.before(node):
        p.edit.call(aten.mul_.Tensor, node.args[0], 2.0)


def padding_ignored(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "key_mask", None)


def causality_lost(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "causal", False)


def window_added(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "window", 3)


def wrong_scale(p: Program) -> None:
    set_argument(first(p, "graphopt.attention"), "scale", 0.36)


def epsilon_changed(p: Program) -> None:
    set_argument(first(p, "graphopt.rms_norm"), "eps", 1e-3)


def dropped_residual(p: Program) -> None:
    block = p.anatomy.ffn[0]
    p.bypass(block.writes, with_=block.term)


def one_row_off(p: Program) -> None:
    node = p.anatomy.ffn[1].parts["up"].args[1]
    weight = p.weights[node.name]
    tensor = weight.source.load().clone()
    tensor[3] *= 1 + 1e-5
    p.weights[node.name] = replace(weight, source=InMemory(tensor))


def wrong_slice(p: Program) -> None:
    gate, up = p.anatomy.ffn[0].parts["gate"], p.anatomy.ffn[0].parts["up"]
    with p.edit.before(gate):
        joined = p.edit.call(aten.cat.default, [gate.args[1], up.args[1]], 0)
        both = p.edit.call(aten.linear.default, gate.args[0], joined)
        shifted = p.edit.call(aten.slice.Tensor, both, -1, 1, 49)
    p.edit.replace(gate, shifted)


def head_order_changed(p: Program) -> None:
    node = p.anatomy.attention[0].parts["o"]
    p.replace(node, lambda x, w: torch.nn.functional.linear(torch.roll(x, 8, -1), w))


def outputs_swapped_for_another(p: Program) -> None:
    p.edit.set_outputs([p.insert_after(p.outputs["logits"], lambda x: x.flip(-1))])


def type_changed(p: Program) -> None:
    node = first(p, "aten.silu")
    with p.edit.before(node):
        new = p.edit.call(aten.to.dtype, node.args[0], torch.float64)
    p.edit.replace(node, new)


def rotation_reversed(p: Program) -> None:
    node = first(p, "graphopt.rotary")
    with p.edit.before(node):
        turned = p.edit.call(aten.neg.default, node.args[2])
    set_argument(node, "sin", turned)


def read_before_defined(p: Program) -> None:
    late, early = first(p, "aten.silu", 1), first(p, "aten.silu", 0)
    early.prepend(late)


FAULTS: list[Callable[[Program], None]] = [
    scaled_rule, lost_bias, swapped_keys_and_values, stale_shape, wrong_shape, tied_weight_changed_once,
    in_place_operator, padding_ignored, causality_lost, window_added, wrong_scale, epsilon_changed, dropped_residual,
    one_row_off, wrong_slice, head_order_changed, outputs_swapped_for_another, type_changed, rotation_reversed,
    read_before_defined,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_caught_and_rolled_back(program: Program, fault: Callable[[Program], None]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Faulty(Pass):
        """Promise exactness and break it."""

        name = "faulty"
        contract = Exact()

        def plan(self, program: Program, context: Context) -> Plan:
            return Plan([Site("everything")])

        def rewrite(self, program: Program, plan: Plan) -> None:
            fault(program)

    before = program.text()
    with pytest.raises((ContractError, VerificationError)):
        run_pipeline(program, [Faulty()], Context())
    assert program.text() == before, "a failed pass left its marks on the program"


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 15
