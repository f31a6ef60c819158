"""Every architecture of the zoo: captured and compared with the model, named, rewritten exactly, saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from sharing import everyones, shared

import graphopt
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.checking.verify import compare_programs, verify
from graphopt.ir.facts import Capture
from graphopt.ir.ranks.rank_programs import synchronisations
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.schema import argument
from graphopt.measure.context import Context
from graphopt.passes import parse_pipeline
from graphopt.passes.framework.manager import run_pipeline

EXACT = ", ".join(
    f"{name}{{allow_no_match=true}}" for name in ("split-projections", "fuse-projections", "fold-norms")
)


@pytest.fixture(scope="module", params=list(zoo.CASES))
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A program of each architecture; capturing compares it with the model at several sizes and paddings."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    model = zoo.make(name)
    model.save_pretrained(folder)
    program = capture_huggingface(folder)
    shared(program, everyones(tmp_path_factory, "captured", name))
    return name, folder, program


def test_blocks_are_found_and_rightly_named(captured) -> None:
    name, _, program = captured
    case, anatomy = zoo.CASES[name], program.anatomy
    assert anatomy.summary() == case.blocks, "a block was missed, split, or called something else"
    kinds = {block.norms for block in anatomy.blocks}
    wanted = (
        {case.norms} if name != "modernbert" else {"pre", "none"}
    )  # its first layer has no norm before attention
    assert kinds == wanted, "norms were placed wrongly"
    assert all(block.evidence for block in anatomy.blocks), "a name without evidence cannot be trusted"
    if case.heads is not None:
        found = {(b.sizes["heads"], b.sizes["kv_heads"]) for b in anatomy.attention}
        assert found == {case.heads}, "grouped heads were expanded or miscounted"


def test_attention_is_raised_whatever_its_spelling(captured) -> None:
    name, _, program = captured
    case = zoo.CASES[name]
    cores = [b.parts["core"] for b in program.anatomy.attention if "core" in b.parts]
    assert len(cores) == case.blocks.get("attention", 0), program.facts.get(Capture)
    mixtures = program.operators["graphopt.routed_ffn"]
    assert mixtures == case.blocks.get("experts", 0), program.facts.get(Capture)
    if "window" in case.features:
        assert any(argument(core, "window") for core in cores), "a sliding window was lost in raising"
    if "sinks" in case.features:
        assert all(argument(core, "sinks") is not None for core in cores), (
            "attention sinks were lost in raising"
        )
    if "parallel" in case.features:
        assert all(block.parallel for block in program.anatomy.blocks), (
            "parallel branches were taken for a sequence"
        )
    if "fused_qkv" in case.features:
        block = program.anatomy.attention[0]
        assert block.parts["q"] is block.parts["k"] is block.parts["v"], (
            "one stored projection was seen as several"
        )


def test_only_functional_operators_are_left(captured) -> None:
    _, _, program = captured
    verify(program)


def test_exact_passes_are_exact(captured) -> None:
    _, _, program = captured
    rewritten = run_pipeline(program, parse_pipeline(EXACT), Context())
    assert sum(len(entry.sites) for entry in rewritten.report.passes) > 0 or "conv" in str(program.operators)
    inputs = example_inputs(program)
    errors = compare_programs(program, rewritten, program.bind((), inputs))
    assert max(errors.values()) < 1e-10, "a pass that promises exactness changed the function"


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_over_ranks(captured, ranks: int) -> None:
    name, _, program = captured
    case = zoo.CASES[name]
    heads = {b.sizes["heads"] for b in program.anatomy.attention if "heads" in b.sizes}
    if not heads:
        with pytest.raises(graphopt.ir.errors.PassRefusedError, match="every rank computes all of it"):
            graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")
        return
    if any(h % ranks for h in heads):
        with pytest.raises(graphopt.ir.errors.PassRefusedError, match="heads do not divide"):
            graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")
        return
    sharded = graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")
    taken = [s for s in sharded.report.passes[-1].sites if "." in s]
    assert len(taken) == sum(case.blocks.values()), f"left whole: {sharded.report.passes[-1].refused}"
    per_block = 0.5 if program.anatomy.blocks[0].parallel else 1
    assert len(synchronisations(sharded)) == per_block * len(taken), "a sum too many, or one too few"
    inputs = example_inputs(program)
    errors = compare_programs(program, sharded, program.bind((), inputs))
    assert max(errors.values()) < 1e-10, "the ranks together do not compute what the model does"
    first, second = program(**inputs), sharded(**inputs)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, second[key], atol=1e-5), f"output {key} differs in float32"


def test_saved_and_loaded_is_equal(captured, tmp_path: Path) -> None:
    _, _, program = captured
    program.save(tmp_path / "saved")
    again = graphopt.load(tmp_path / "saved")
    inputs = example_inputs(program, seed=3)
    first, second = program(**inputs), again(**inputs)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, second[key], atol=1e-6), f"output {key} changed by saving"


def test_capture_needs_no_position_in_the_registry_of_names() -> None:
    assert len(zoo.CASES) >= 35, "the table must cover at least 35 configurations"
