"""A site whose rewrite fails is rolled back and said aloud; the other sites of the pass are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import graphopt
from graphopt import ContractError, VerificationError
from graphopt.ir.facts import TensorParallel
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator
from graphopt.measure.context import Context
from graphopt.passes import Exact, Pass, Plan, Site
from graphopt.passes.framework.contracts import Contract
from graphopt.passes.framework.manager import run_pipeline
from graphopt.passes.framework.registry import BUILT_IN, find_pass

aten = torch.ops.aten


def right(p: Program, node: fx.Node) -> None:
    p.replace(node, lambda x: torch.sigmoid(x) * x)


def wrong_value(p: Program, node: fx.Node) -> None:
    p.replace(node, lambda x: torch.sigmoid(x) * x * 1.001)


def wrong_shape(p: Program, node: fx.Node) -> None:
    with p.edit.before(node):
        new = p.edit.call(aten.slice.Tensor, node.args[0], 1, 0, 2)
    p.edit.replace(node, new)


def crash(p: Program, node: fx.Node) -> None:
    p.edit.touched[node] = None
    raise TypeError("no such thing")


def half_done(p: Program, node: fx.Node) -> None:
    wrong_value(p, node)
    p.facts.add(TensorParallel(3))
    raise VerificationError("it cannot be done after all")


def no_key(p: Program, node: fx.Node) -> None:
    del p.weights["not there"]


KINDS: dict[str, Callable[[Program, fx.Node], None]] = {
    f.__name__: f for f in (right, wrong_value, wrong_shape, crash, half_done, no_key)
}


@dataclass(frozen=True, kw_only=True)
class Spell(Pass):
    """Write SiLU in two operators, in one of several ways at each site."""

    name = "spell"
    kinds: ClassVar[tuple[str, ...]] = ()
    contract: ClassVar[Contract] = Exact()

    def plan(self, program: Program, context: Context) -> Plan:
        found = [n for n in program.graph.nodes if is_operator(n, "aten.silu")]
        return Plan([Site(n.name, kind=kind) for n, kind in zip(found, self.kinds, strict=True)])

    def rewrite(self, program: Program, plan: Plan) -> None:
        nodes = {n.name: n for n in program.graph.nodes}
        for site in plan.sites:
            KINDS[site["kind"]](program, nodes[site.block])


def spell(*kinds: str, together: bool = False, allow_no_match: bool = False) -> Pass:
    made = type("Planted", (Spell,), {"kinds": kinds, "together": together, "__doc__": Spell.__doc__})
    return made(allow_no_match=allow_no_match)


class Chain(nn.Module):
    """Layers, one after the other or side by side."""

    def __init__(self, count: int, *, residual: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = nn.functional.silu(layer(x))
            x = x + y if self.residual else y
        return x


def chain(count: int, *, residual: bool = False) -> Program:
    torch.manual_seed(0)
    return graphopt.capture(Chain(count, residual=residual).eval(), torch.randn(2, 4))


def silus(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if is_operator(n, "aten.silu")]


@settings(max_examples=examples(24), deadline=None)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), residual=st.booleans())
def test_sites_that_fail_are_left_out_and_no_others(kinds: list[str], residual: bool) -> None:
    given_program = chain(len(kinds), residual=residual)
    text, names = given_program.text(), silus(given_program)
    made = run_pipeline(given_program, [spell(*kinds, allow_no_match=True)], Context())
    entry = made.report.passes[-1]
    good = [name for name, kind in zip(names, kinds, strict=True) if kind == "right"]
    assert entry.sites == good
    assert {r.block for r in entry.refused} == set(names) - set(good)
    assert all(r.rolled_back and r.reason for r in entry.refused)
    assert silus(made) == [n for n in names if n not in good], "a site that was left out left a trace"
    assert TensorParallel not in made.facts
    assert given_program.text() == text
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(x), given_program(x))
    assert [s["block"] for s in made.history[-1]["plan"]["sites"]] == good


def test_a_broken_contract_is_said_aloud() -> None:
    program = chain(3)
    wrong = silus(program)[1]
    made = run_pipeline(program, [spell("right", "wrong_value", "right")], Context())
    entry = made.report.passes[-1]
    assert f"contract broken at {wrong}" in entry.refused[0].reason
    said = str(made.report)
    assert "sites ROLLED BACK, a fault of this pass: 1" in said
    assert any("a fault of spell" in note for note in entry.notes)
    assert entry.error < 1e-11, "the error is that of the sites that were taken"


def test_a_fault_ahead_does_not_take_those_behind_it() -> None:
    """In a chain whose every value changes, one wrong value shows in each comparison after it."""
    made = run_pipeline(chain(5), [spell("wrong_value", *["right"] * 4)], Context())
    assert len(made.report.passes[-1].sites) == 4


@pytest.mark.parametrize("kind", ["wrong_value", "wrong_shape", "half_done"])
def test_nothing_left_ends_the_pass(kind: str) -> None:
    program = chain(2)
    text = program.text()
    with pytest.raises((ContractError, VerificationError)):
        run_pipeline(program, [spell(kind, kind)], Context())
    assert program.text() == text


def test_an_internal_error_at_every_site_is_not_hidden() -> None:
    with pytest.raises(TypeError, match="no such thing"):
        run_pipeline(chain(2), [spell("crash", "crash")], Context())


def test_sites_that_belong_together_go_together() -> None:
    program = chain(3)
    with pytest.raises(ContractError):
        run_pipeline(program, [spell("right", "wrong_value", "right", together=True)], Context())
    step = spell("right", "wrong_value", "right", together=True, allow_no_match=True)
    made = run_pipeline(program, [step], Context())
    assert made.report.passes[-1].sites == []
    assert silus(made) == silus(program)


def test_a_pipeline_goes_on_behind_a_site_that_failed() -> None:
    made = run_pipeline(chain(3), [spell("right", "crash", "right"), spell("right")], Context())
    assert silus(made) == []


def test_whole_programs_are_compared_without_the_sites_that_failed() -> None:
    program = chain(3)
    x = program.bind((torch.randn(2, 4, dtype=torch.float64),), {})
    made = run_pipeline(program, [spell("right", "crash", "right")], Context(), verify_with="full", inputs=x)
    assert len(made.report.passes[-1].sites) == 2


@pytest.mark.parametrize("name", [n for n in BUILT_IN if set(find_pass(n).requires) <= {"canonical"}])
def test_a_pass_that_finds_nothing_lets_the_pipeline_go_on_where_it_may(name: str) -> None:
    """Wrong if a refusal of the whole pass ended what its option says may go on."""
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4))
    kind = find_pass(name)
    data = [{"input": torch.randn(2, 4)}]
    step = kind(**{**kind.trial, "allow_no_match": True})  # type: ignore[arg-type]
    done = graphopt.optimize(program, [step, "sort-ffn{allow_no_match=true}"], data=data)
    assert [entry.name for entry in done.report.passes] == [name, "sort-ffn"]
    assert not done.report.passes[0].sites
    with pytest.raises(graphopt.GraphoptError):
        graphopt.optimize(program, [kind(**kind.trial)], data=data)
