"""What planning found is not looked for again: analyses, tries and metrics run once for each state of a program."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_plans_are_obeyed import CASES, ONE_SITE, decoder, done
from torch import fx

import graphopt
from graphopt.ir.errors import VerificationError
from graphopt.ir.program import METHODS, Program
from graphopt.ir.relocation import relocated
from graphopt.measure import context as measuring
from graphopt.passes import Context, parse_pipeline
from graphopt.passes.framework.manager import run_pass
from graphopt.passes.framework.plan import Findings, Plan, read_plans, write_plans
from graphopt.passes.quantization import quantize
from graphopt.passes.width.nesting import place_of


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def fresh(text: str) -> tuple[Program, Any, Any]:
    make, data = (CASES | ONE_SITE)[text]
    (step,) = parse_pipeline(text)
    # of its own, since what was found of the shared one is known already
    return make().copy(), step, data


@pytest.mark.parametrize("text", [*CASES, *ONE_SITE])
def test_a_plan_that_was_written_makes_the_same_program(text: str) -> None:
    """Wrong if a plan that carries what it found were carried out in another way than one that a file holds."""
    program, step, data = fresh(text)
    first, _ = run_pass(program, step, Context(data), verify_with="off")
    plan = step.plan(program, Context(data))
    ((_, read),) = read_plans(write_plans([(str(step), plan)]))
    assert read == plan and read.trial is None
    again, entry = run_pass(program.copy(), step, Context(data), plan=read, verify_with="off")
    assert entry.given
    assert again.text() == first.text()
    assert again.facts == first.facts and again.dials == first.dials
    assert {n: node.name for n, node in again.checkpoint.items()} == {
        n: node.name for n, node in first.checkpoint.items()
    }


@pytest.mark.parametrize("text", [*CASES, *ONE_SITE])
@pytest.mark.parametrize("given", [False, True])
def test_a_pass_finds_and_rewrites_once(text: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if rewriting looked for what planning had found, or planning tried what was then made a second time."""
    program, step, data = fresh(text)
    plan = Plan.from_dict(step.plan(program, Context(data)).as_dict()) if given else None
    program = program.copy()
    calls: Counter[str] = Counter()
    for name in ("find", "rewrite"):
        if name in vars(type(step)):
            counted(monkeypatch, type(step), name, calls)
    made, _ = run_pass(program, step, Context(data), plan=plan, verify_with="off")
    assert made.text() != program.text()
    assert calls["find"] <= 1 and calls["rewrite"] <= 1, calls


@pytest.mark.parametrize(
    "text", ["fuse-projections", "group-heads{size=2}", "attach-early-exit{layers=[0 1]}"]
)
def test_blocks_are_found_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if the copy that is rewritten were read block by block again."""
    program, step, data = fresh(text)
    calls: Counter[str] = Counter()
    original = METHODS["anatomy"]

    def anatomy(given: Program) -> Any:
        calls["anatomy"] += 1
        return original(given)

    monkeypatch.setitem(METHODS, "anatomy", anatomy)
    run_pass(program, step, Context(data), verify_with="off")
    assert calls["anatomy"] == 1


@pytest.mark.parametrize("options", ["weights=8", "weights=4", "weights=4 mixed=true budget=9 metric=kl"])
@pytest.mark.parametrize("given", [False, True])
def test_scales_are_measured_once(options: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if rewriting measured a matrix again, or every program that a search for bits tries."""
    program = done(decoder(), "fit-target").copy()
    (step,) = parse_pipeline(f"quantize{{{options}}}")
    plan = Plan.from_dict(step.plan(program, Context(DATA)).as_dict()) if given else None
    calls: Counter[str] = Counter()
    counted(monkeypatch, quantize, "matrix_scales", calls)
    made, _ = run_pass(program.copy(), step, Context(DATA), plan=plan, verify_with="off")
    matrices = sum(name.endswith("_quantize_scale") for name in (w.name for w in made.weights.values()))
    # with mixed bits each is measured with four and with eight
    assert matrices and calls["matrix_scales"] == matrices * (2 if "mixed" in options and not given else 1)


def test_what_was_found_goes_with_a_copy_until_it_is_edited() -> None:
    """Wrong if a copy spoke of the nodes of another graph, or an edited one of what was there before."""
    program = decoder().copy()
    before = program.anatomy
    copy = program.copy(analysed=True)
    found = copy.anatomy
    assert [b.name for b in found.blocks] == [b.name for b in before.blocks]
    assert all(n.graph is copy.graph for b in found.blocks for n in (*b.nodes, *b.parts.values(), b.add))
    assert found.layers[0].blocks[0] is found.blocks[0], "one block became two"
    copy.remove(found.layers[0])
    assert len(copy.anatomy.layers) == len(before.layers) - 1
    assert len(program.anatomy.layers) == len(before.layers)
    assert copy.copy(analysed=True).anatomy.layers[-1].writes.graph is not copy.graph


def test_functions_that_hold_nodes_do_not_go_with_a_copy() -> None:
    """Wrong if a function that reads another graph were carried over in silence."""
    program = decoder()
    node = program.output_node
    copy = {n.name: n for n in program.copy().graph.nodes}
    assert relocated([(node, 3), {"a": {node}}], copy) == [(copy[node.name], 3), {"a": {copy[node.name]}}]
    with pytest.raises(TypeError, match="may hold nodes"):
        relocated([lambda: node], copy)


def test_a_trial_is_of_one_program_and_one_plan() -> None:
    """Wrong if what was tried went on although the plan was cut, or the program was edited meanwhile."""
    program = decoder().copy()
    (step,) = parse_pipeline("sort-ffn{score=random}")
    plan = step.plan(program, Context())
    assert plan.trial is not None
    assert plan.trial.take(step, program, plan.sites[:1]) is None
    assert plan.trial.take(step, program.copy(), plan.sites) is None
    (other,) = parse_pipeline("sort-ffn{score=peak}")
    assert plan.trial.take(other, program, plan.sites) is None
    program.changed()
    assert plan.trial.take(step, program, plan.sites) is None
    plan = step.plan(program, Context())
    assert plan.trial is not None
    assert plan.trial.take(step, program, list(plan.sites)) is not None
    assert plan.trial.take(step, program, plan.sites) is None, "two pipelines would go on with one program"


def test_a_cut_plan_that_was_tried_is_carried_out_as_it_is() -> None:
    """Wrong if the trial of the whole plan went on in its place."""
    program = decoder().copy()
    (step,) = parse_pipeline("prune-ffn{fraction=0.5 score=random}")
    plan = step.plan(program, Context())
    plan.sites = plan.sites[1:2]
    made, entry = run_pass(program, step, Context(), plan=plan, verify_with="off")
    assert entry.sites == ["ffn.1"]
    assert [int(b.sizes["width"]) for b in made.anatomy.ffn] == [24, 12, 24]


@pytest.mark.parametrize(
    ("text", "module", "name"),
    [
        ("fuse-branches", "convolutions.fuse_branches", "write_form"),
        ("split-ffn{score=none}", "width.split_ffn", "nested"),
    ],
)
def test_a_site_that_fails_while_planning_is_rolled_back_alone(
    text: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if what planning tries could end a pass that goes on where rewriting fails."""
    make, data = CASES.get(text, CASES["split-ffn{score=random}"])
    program = make().copy()
    (step,) = parse_pipeline(text)
    sites = [site.block for site in step.plan(program, Context(data)).sites]
    owner = importlib.import_module(f"graphopt.passes.{module}")
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[Any] = []

    def fails(given: Program, part: Any, *rest: Any) -> Any:
        # the second place of the graph, however often it is tried
        where = part.value.name if name == "write_form" else place_of(given, part.down)
        if where not in calls:
            calls.append(where)
        if calls.index(where) == 1:
            raise VerificationError("it cannot be written")
        return original(given, part, *rest)

    monkeypatch.setattr(owner, name, fails)
    program.changed()
    made, entry = run_pass(program, step, Context(data))
    assert len(entry.sites) == len(sites) - 1
    assert [r.block for r in entry.refused if r.rolled_back] == [s for s in sites if s not in entry.sites]
    assert made.text() != program.text()


def test_a_plan_takes_nothing_that_the_pass_refuses() -> None:
    """Wrong if a site that was added by hand were taken against the reason that the pass has."""
    program = done(decoder(), "fuse-projections")
    (step,) = parse_pipeline("fuse-projections{allow_no_match=true}")
    plan = step.plan(program, Context())
    refused = plan.refused[0]
    plan.sites = [graphopt.passes.Site(refused.block, parts=["q", "k", "v"], layout="plain")]
    with pytest.raises(graphopt.PassRefusedError, match=f"takes {refused.block}, which cannot be taken: "):
        step.rewrite(program.copy(), plan)


def test_findings_are_not_the_plan() -> None:
    """Wrong if whoever edits a plan changed what the pass has found."""
    node = fx.Graph().placeholder("x")
    findings = Findings.of([(graphopt.passes.Site("a", parts=["q"]), node)])
    plan = findings.plan()
    plan.sites[0].choices["parts"].append("k")
    assert findings.plan().sites[0]["parts"] == ["q"]
    assert findings.chosen(plan) == [(plan.sites[0], node)]


DATA = [
    {"input_ids": torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(s))} for s in (0, 1)
]


@pytest.mark.parametrize(
    ("metric", "most"),
    [("perplexity", 1), ("kl", 2)],  # what is compared with one original runs once more as the next
)
def test_a_budget_measures_each_program_once(metric: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if what a search tried ran again to be judged, or what judged one pass as the original of the next."""
    runs: Counter[int] = Counter()
    run = measuring.run

    def counted_run(program: Program, inputs: Any) -> Any:
        runs[program.number] += 1
        return run(program, inputs)

    monkeypatch.setattr(measuring, "run", counted_run)
    options = f"budget=9 metric={metric}"
    text = f"skip-layers{{layers=[0] {options}}}, prune-ffn{{score=random {options}}}"
    made = graphopt.optimize(decoder().copy(), text, data=DATA)
    assert made.report is not None
    assert all("relative loss" in entry.metric for entry in made.report.passes)
    # the original, it without a layer, and four widths, on one batch
    assert sorted(runs.values()) == [1] * 5 + [most], runs


def test_scores_run_the_original_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if every score of a metric that compares ran the original as well."""
    program = decoder().copy()
    runs: Counter[int] = Counter()
    run = measuring.run

    def counted_run(given: Program, inputs: Any) -> Any:
        runs[given.number] += 1
        return run(given, inputs)

    monkeypatch.setattr(measuring, "run", counted_run)
    (step,) = parse_pipeline("skip-layers{remove=1 score=kl}")
    scores = step.plan(program, Context(DATA)).scores
    assert len(scores) == 3
    assert runs[program.number] <= 2, "for the estimate, and to compare with"
    runs.clear()
    monkeypatch.setattr(measuring, "OUTPUTS_KEPT", 0)
    assert step.plan(decoder().copy(), Context(DATA)).scores == scores, (
        "outputs that are not kept are computed"
    )
