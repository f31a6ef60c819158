"""The number of active experts as a dial: exact as trained, elsewhere what a model with that number computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo

import graphopt
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.errors import LoweringError, PassRefusedError, PipelineError, UsageError
from graphopt.ir.export_blockers import block_export, export_blockers, unblock_export
from graphopt.ir.facts import CheckpointChanges
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs

MIXTURES = [name for name, case in zoo.CASES.items() if case.blocks.get("experts")]


def logits(program: Program, **settings: float) -> torch.Tensor:
    found = program(**example_inputs(program), **settings)
    return next(v for v in found.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", MIXTURES)
def test_as_trained_nothing_changes(name: str, captured: Callable[[str], Program]) -> None:
    program = captured(name)
    done = graphopt.optimize(program, "dial-top-k{allow_no_match=true}")
    assert not done.report.passes[-1].refused
    inputs = example_inputs(program)
    bound = {
        **program.bind((), inputs),
        **{n: torch.tensor(d.default, dtype=torch.float64) for n, d in done.dials.items()},
    }
    errors = compare_programs(program, done, bound)
    assert max(errors.values()) < 1e-10
    assert torch.allclose(logits(done), logits(program), atol=1e-6)
    assert not torch.allclose(logits(done, active_experts=1), logits(program), atol=1e-6), (
        "the dial turns nothing"
    )


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "olmoe", "qwen3_moe"])
def test_turned_down_it_is_a_model_with_that_number(
    name: str, captured: Callable[[str], Program], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    program = captured(name)
    done = graphopt.optimize(program, "dial-top-k")
    config = copy.deepcopy(AutoConfig.from_pretrained(checkpoint(name)))
    config.num_experts_per_tok = 1
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), config=config).eval()
    inputs = {k: v for k, v in example_inputs(program).items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).logits
    found = done(**inputs, active_experts=1)["logits"]
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-4), (
        "one expert is not what a model with one computes"
    )
    fixed = graphopt.optimize(program, "dial-top-k{fixed=1}")
    assert torch.equal(logits(fixed), logits(done, active_experts=1))
    fixed.save_pretrained(tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").num_experts_per_tok == 1


def test_dials_by_layer_and_their_limits(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured("mixtral")
    done = graphopt.optimize(program, "dial-top-k{per_layer=true}")
    assert set(done.dials) == {"active_experts_0", "active_experts_1"}
    one, both = logits(done, active_experts_0=1), logits(done, active_experts_0=1, active_experts_1=1)
    assert not torch.allclose(one, both, atol=1e-6)
    again = graphopt.load(done.save(tmp_path / "saved"))
    assert torch.equal(logits(again, active_experts_0=1), one)
    for wrong in (0, 3):
        with pytest.raises(UsageError, match="its range is 1.0 to 2.0"):
            logits(done, active_experts_0=wrong)
    with pytest.raises(PassRefusedError, match="trained with 2 active experts"):
        graphopt.optimize(program, "dial-top-k{fixed=5}")
    with pytest.raises(PipelineError, match="exclude one another"):
        graphopt.optimize(program, "dial-top-k{fixed=1 per_layer=true}")
    with pytest.raises(graphopt.LoweringError, match="dial"):
        done.save_pretrained(tmp_path / "hf")


def test_unnormalised_routers_are_named(captured: Callable[[str], Program]) -> None:
    loose = graphopt.optimize(captured("olmoe"), "dial-top-k").report.passes[-1]
    tight = graphopt.optimize(captured("mixtral"), "dial-top-k").report.passes[-1]
    assert any("adds less" in note for note in loose.notes)
    assert not any("adds less" in note for note in tight.notes)


def test_experts_that_take_no_part_are_not_computed(captured: Callable[[str], Program]) -> None:
    """Work must follow the dial: an expert whose matrices are not numbers shows if it is touched."""
    from graphopt.ir.operators import routed_ffn

    x, up, down = torch.randn(6, 4), torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    up[2] = float("nan")
    experts, weights = torch.tensor([[0, 3], [1, 3]]).repeat(3, 1), torch.rand(6, 2)
    found = routed_ffn(x, experts, weights, up, down, None, None, torch.zeros(1, dtype=torch.long))
    assert bool(found.isfinite().all())
    alone = routed_ffn(x, experts[:, :1], weights[:, :1], up, down)
    assert torch.allclose(found, alone)
    up[2] = 1.0  # a traced graph multiplies by zero instead, which must come to the same
    first = torch.zeros(1, dtype=torch.long)
    traced = routed_ffn(x.requires_grad_(), experts, weights, up, down, None, None, first)
    assert torch.allclose(traced, alone, atol=1e-6)


def test_dialled_mixture_is_sharded_and_lowered(captured: Callable[[str], Program], tmp_path: Path) -> None:
    done = graphopt.optimize(captured("mixtral"), "dial-top-k{fixed=1}")
    for how in ("width", "expert"):
        sharded = graphopt.optimize(done, f"shard-tensor-parallel{{size=2 experts={how}}}")
        assert torch.allclose(logits(sharded), logits(done), atol=1e-5)
    done.lower("onnx", tmp_path / "m.onnx")


@pytest.mark.parametrize("k", [1, 2])
def test_a_trained_dial_goes_back_to_a_folder(
    k: int, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """What was trained at many settings is shipped at one."""
    from transformers import AutoModelForCausalLM

    from graphopt.training import Settings

    dialled = graphopt.optimize(captured("olmoe"), "dial-top-k")
    ids = torch.randint(3, 100, (2, 8))
    trained, _ = graphopt.train(
        dialled, "phds", [{"input_ids": ids}], Settings(steps=2, learning_rate=1e-2), device="cpu"
    )
    with pytest.raises(LoweringError, match="freeze-dial"):
        trained.save_pretrained(tmp_path / "dialled")
    still = graphopt.optimize(trained, f"freeze-dial{{value={k}}}")
    still.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_experts_per_tok == k
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.allclose(trained(input_ids=ids, active_experts=k)["logits"], expected, atol=1e-5)
    assert not torch.allclose(captured("olmoe")(input_ids=ids)["logits"], expected, atol=1e-3)


def test_dials_of_layers_that_stand_alike_are_one_number(captured: Callable[[str], Program]) -> None:
    apart = graphopt.optimize(captured("olmoe"), "dial-top-k{per_layer=true}")
    names = list(apart.dials)
    alike, apart_still = apart, apart
    for number, name in enumerate(names):
        alike = graphopt.optimize(alike, f"freeze-dial{{dial={name} value=1}}")
        apart_still = graphopt.optimize(apart_still, f"freeze-dial{{dial={name} value={1 + (number > 0)}}}")
    assert not export_blockers(alike)
    assert alike.facts[CheckpointChanges].active_experts == (2, 1)
    assert "different numbers" in export_blockers(apart_still)["dial-top-k"][0]


def test_a_program_that_was_saved_with_other_words_is_frozen_as_well(
    captured: Callable[[str], Program],
) -> None:
    """Wrong if it were known by its reason's text: then no folder could hold what the setting is frozen at."""
    done = graphopt.optimize(captured("mixtral"), "dial-top-k").copy()
    unblock_export(done, "dial-top-k")
    block_export(
        done, "the number of active experts is a dial, which a configuration has not", by="dial-top-k"
    )
    frozen = graphopt.optimize(done, "freeze-dial{value=1}")
    assert not export_blockers(frozen)
    assert frozen.facts[CheckpointChanges].active_experts == (2, 1)
