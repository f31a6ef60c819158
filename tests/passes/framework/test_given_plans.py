"""A plan that was edited: what is reported is what was done, in our words and in those of other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import graphopt
from graphopt.cli.running import run
from graphopt.passes.framework.plan import Plan, Refused, Site


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = yaml.safe_load(path.read_text())
    change(document["passes"][0])
    path.write_text(yaml.safe_dump(document))


@pytest.mark.parametrize("options", ["layers=[0]", "remove=1"])
def test_an_edited_plan_is_reported_with_its_own_layers(
    options: str, whole: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    """Wrong if anybody who copies a line for another tool removed another layer than was removed here."""
    plan = tmp_path / "p.yaml"
    data = ["--data", str(rows)]
    assert run(["plan", str(whole), "-p", f"skip-layers{{{options}}}", "-o", str(plan), *data]) == 0
    planned = capsys.readouterr().out
    (taken,) = (s["block"] for s in yaml.safe_load(plan.read_text())["passes"][0]["sites"])
    first = int(taken.removeprefix("layer."))
    assert f"--prune-layers {first}" in planned
    other = 1 - first
    edited(plan, lambda step: step.update(sites=[{"block": f"layer.{other}", "number": other}]))
    out = tmp_path / "out"
    assert run(["optimize", str(whole), "--plan", str(plan), "-o", str(out), *data]) == 0
    told = capsys.readouterr().out
    assert f"sites taken: 1  layer.{other}" in told
    assert "by the plan given" in told, "its options say another layer"
    assert f"--prune-layers {other}\n" in told and f"--prune-layers {first}\n" not in told
    ranges = "[1, 2]" if other == 0 else "[0, 1]"
    assert f"layer_range {ranges}\n" in told
    assert f"layer.{other}: kept" not in told, "a layer that went is said to be kept"
    record = graphopt.load(out).history[-1]["plan"]
    assert [s["block"] for s in record["sites"]] == [f"layer.{other}"]
    assert not [r for r in record["refused"] if r["block"] == f"layer.{other}"]


def test_numbers_of_channels_are_those_of_the_plan(
    whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    plan = tmp_path / "p.yaml"
    planned = told("plan", whole, "-p", "prune-ffn{fraction=0.5 score=peak}", "-o", plan)
    assert any("(-50.0%)" in note for note in planned[0]["notes"])
    edited(plan, lambda step: step["sites"].pop())
    found = told("optimize", whole, "--plan", plan, "-o", tmp_path / "out")
    width = planned[0]["sites"][0]["width"]
    assert f"hidden channels: {width} -> {width // 2} (-50.0%)" in found["report"]["passes"][0]["notes"]


def test_a_plan_as_given_says_what_is_of_the_past() -> None:
    plan = Plan([Site("a")], [Refused("a", "kept"), Refused("b", "kept")], {"a": 1.0}, ["loss 3"])
    given = plan.to_follow()
    assert given.sites == plan.sites and given.refused == [Refused("b", "kept")]
    assert given.notes == ["when it was planned: loss 3"]
    assert given.to_follow().notes == given.notes, "each time a plan is obeyed it grows"
    assert plan.notes == ["loss 3"]
