"""insert-cache does what its plan says, or says why that makes no sense."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import graphopt
from graphopt.ir.errors import PassRefusedError, PipelineError
from graphopt.ir.facts import KVCache
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes.caching.insert_cache import InsertCache
from graphopt.passes.framework.pipeline import parse_pipeline
from graphopt.passes.framework.plan import Plan, Site
from graphopt.passes.framework.registry import pass_locations


def planned(program: Program) -> Plan:
    return InsertCache().plan(program, Context())


def test_all_sites_or_none(captured: Callable[[str], Program]) -> None:
    """An attention without a cache would see new tokens alone, so a part of the plan is refused by name."""
    program = captured("llama")
    plan = planned(program)
    assert len(plan.sites) == 2
    made = graphopt.optimize(program, "insert-cache", plan=[plan])
    assert made.facts[KVCache].layers == 2
    for kept, left in ((plan.sites[:1], plan.sites[1]), (plan.sites[1:], plan.sites[0])):
        with pytest.raises(PassRefusedError, match=f"leaves out {left.block}: without a cache"):
            graphopt.optimize(program, "insert-cache", plan=[Plan(kept)])


def test_no_site_is_no_cache(captured: Callable[[str], Program]) -> None:
    """A pass that took nothing has provided nothing: the cache may still be put in."""
    program = captured("llama")
    with pytest.raises(PassRefusedError, match="matched nothing"):
        graphopt.optimize(program, "insert-cache", plan=[Plan()])
    same = graphopt.optimize(program, "insert-cache{allow_no_match=true}", plan=[Plan()])
    assert same.text() == program.text() and KVCache not in same.facts
    refused = graphopt.optimize(captured("bert"), "insert-cache{allow_no_match=true}")
    assert KVCache not in refused.facts
    assert graphopt.optimize(same, "insert-cache").facts[KVCache].layers == 2


def test_a_plan_of_another_program(captured: Callable[[str], Program]) -> None:
    """Sites that are not there, other sizes, a longer cache than the model has positions for."""
    program = captured("llama")
    plan = planned(program)
    first = plan.sites[0]
    other = Site(first.block, **{**first.choices, "heads": 7})
    with pytest.raises(PassRefusedError, match="heads=7.* where the program has .*heads=2"):
        graphopt.optimize(program, "insert-cache", plan=[Plan([other, plan.sites[1]])])
    with pytest.raises(PipelineError, match="names 'attention_default_9'"):
        graphopt.optimize(program, "insert-cache", plan=[Plan([*plan.sites, Site("attention_default_9")])])
    with pytest.raises(PassRefusedError, match="sees later tokens"):
        graphopt.optimize(captured("bert"), "insert-cache", plan=[plan])
    mpt = captured("mpt")
    with pytest.raises(PassRefusedError, match="positions for 64 tokens, 65 are more"):
        graphopt.optimize(mpt, "insert-cache{max_length=65}", plan=[planned(mpt)])


def test_the_former_name() -> None:
    """Pipelines and plan files that were written before the pass had states go on working."""
    (former,) = parse_pipeline("insert-kv-cache{max_length=12}")
    assert str(former) == "insert-cache{max_length=12}"
    assert "insert-kv-cache" not in pass_locations()
