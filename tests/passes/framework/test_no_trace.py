"""A pass that only plans, or refuses, leaves the program as it was: text, sizes, facts, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

import graphopt
from graphopt.ir.compat import symbol_range
from graphopt.ir.errors import GraphoptError
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes.framework.registry import BUILT_IN, find_pass


def state(program: Program) -> dict[str, Any]:
    """Return what a pass could leave behind."""
    env: Any = program.mode.shape_env
    return {
        "text": program.text(),
        "values": [str(n.meta.get("val")) for n in program.nodes],
        "ranges": {n: symbol_range(program.mode, s) for s, n in program.symbols.items()},
        "guards": [str(g.expr) for g in env.guards],
        "replacements": dict(env.replacements),
        "signature": repr(program.signature),
        "facts": repr(program.facts),
        "dials": dict(program.dials),
        "weights": {n: (w.name, w.names, id(w.source)) for n, w in program.weights.items()},
        "checkpoint": {n: node.name for n, node in program.checkpoint.items()},
        "history": repr(program.history),
        "report": program.report,
        "editor": (len(program.edit.journal), program.edit.author, len(program.edit.touched)),
    }


def data_of(program: Program) -> list[dict[str, torch.Tensor]]:
    from graphopt.ir.running.examples import example_inputs

    return [example_inputs(program, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("name", zoo.CASES)
def test_planning_and_refusing(name: str, captured: Callable[[str], Program], tmp_path: Any) -> None:
    program = captured(name).copy()
    # what is saved may be folded on the way
    saved = graphopt.load(program.save(tmp_path / "before")).text()
    before, data = state(program), data_of(program)
    refused = []
    for kind in map(find_pass, BUILT_IN):
        step = kind(**kind.trial)
        try:
            sites = step.plan(program, Context(data=data)).sites
        except GraphoptError:
            sites = []
        assert state(program) == before, step.name
        if not sites:
            with pytest.raises(GraphoptError):
                graphopt.optimize(program, [step], data=data)
            assert state(program) == before, step.name
            refused.append(step.name)
    assert len(refused) > 4
    assert graphopt.load(program.save(tmp_path / "after")).text() == saved


def test_a_cache_that_is_refused(tmp_path: Any) -> None:
    """After its layers were rewritten on a copy: a second mask without a meaning, and a table read by rows."""
    from caching_networks import TwoTypes

    class Met(TwoTypes):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = super().forward(input_ids)["logits"]
            return {
                "logits": logits + torch.index_select(logits, 0, torch.arange(input_ids.shape[0])).cumsum(1)
            }

    program = graphopt.capture(Met(40, 0).eval(), {"input_ids": torch.randint(0, 20, (3, 6))})
    before = state(program)
    for form in ("", "{max_length=9}", "{tree=true}", "{max_length=41}"):
        with pytest.raises(GraphoptError):
            graphopt.optimize(program, f"insert-cache{form}")
        assert state(program) == before, form
    program.save(tmp_path / "saved")
    found = program.lower("onnx", tmp_path / "m.onnx")
    assert found is None or state(program) == before
