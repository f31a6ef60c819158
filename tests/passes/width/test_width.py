"""Hidden channels sorted and pruned: exact where promised, the same as zeroing where not, written back to folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from amounts import examples
from builders import Shape, Transformer, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.ir.errors import PassRefusedError, PipelineError
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes.framework.kept_tensors import kept
from graphopt.passes.width.prune_ffn import cfsp_ratios
from graphopt.passes.width.scores import SCORES, hidden_scores

pytestmark = pytest.mark.usefixtures("captured_once")


@lru_cache(maxsize=32)
def captured(shape: Shape) -> Program:
    return graphopt.capture(Transformer(shape), tokens(2, 6))


def data(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=seed) for seed in range(count)]


def logits(program: Program) -> torch.Tensor:
    return program(**tokens(2, 9, seed=5))["logits"]


shapes = st.builds(
    Shape,
    width=st.sampled_from([6, 10, 16]),
    gated=st.booleans(),
    bias=st.booleans(),
    placement=st.sampled_from(["pre", "post", "sandwich", "parallel"]),
    gate_up=st.sampled_from(["separate", "plain", "interleaved"]),
    spelling=st.sampled_from(["linear", "conv1d", "transposed"]),
)


@given(shapes, st.sampled_from(SCORES))
@settings(max_examples=examples(20), deadline=None)
def test_sorting_changes_nothing_but_the_order(shape: Shape, score: str) -> None:
    program = captured(shape)
    done = graphopt.optimize(program, f"sort-ffn{{score={score}}}", data=data())
    assert len(done.report.passes[-1].sites) == shape.layers
    assert float((logits(done) - logits(program)).abs().max()) < 1e-11
    context = Context(data())
    sorted_scores = hidden_scores(done, context, done.anatomy.ffn, score)
    if score != "random":
        for values in sorted_scores.values():
            assert bool((values.diff() <= values.abs().max() * 1e-9).all()), (
                "a channel stands before a better one"
            )


@given(shapes, st.floats(0.05, 0.9), st.sampled_from(["norm", "peak", "random"]))
@settings(max_examples=examples(15), deadline=None)
def test_pruning_is_zeroing(shape: Shape, fraction: float, score: str) -> None:
    model = Transformer(shape)
    program = captured(shape)
    done = graphopt.optimize(program, f"prune-ffn{{fraction={fraction:.4f} score={score}}}", data=data())
    plan = done.history[-1]["plan"]
    for number, site in enumerate(plan["sites"]):
        left = kept(site["channels"])[site["block"]]
        assert len(left) == site["kept"]
        fall = model.blocks[number].think.fall.weight
        columns = fall.data if fall.shape[0] == shape.size and shape.spelling != "conv1d" else fall.data.T
        gone = torch.ones(shape.width, dtype=torch.bool)
        gone[left] = False
        columns[:, gone] = 0
    with torch.no_grad():
        expected = model(**tokens(2, 9, seed=5))["logits"]
    assert float((logits(done) - expected).abs().max()) < 1e-10
    assert done.anatomy.ffn[0].sizes["width"] == plan["sites"][0]["kept"]


def test_nothing_pruned_is_the_model() -> None:
    program = captured(Shape())
    done = graphopt.optimize(program, "prune-ffn{fraction=0 score=peak}")
    assert torch.equal(logits(done), logits(program))


def test_importance_beats_chance() -> None:
    program = captured(Shape(width=32, layers=3))
    for matrix in ("norm", "wanda", "contribution", "activation"):
        losses = {}
        for score in (matrix, "random"):
            done = graphopt.optimize(
                program, f"prune-ffn{{fraction=0.5 score={score} metric=kl}}", data=data(6)
            )
            losses[score] = done.report.passes[-1].metric["kl"]
        assert losses[matrix] < losses["random"]


def test_budget_holds() -> None:
    program = captured(Shape(width=32))
    done = graphopt.optimize(program, "prune-ffn{budget=0.2 metric=perplexity}", data=data(6))
    assert done.report.passes[-1].metric["relative loss"] <= 0.2
    with pytest.raises(PassRefusedError, match="even a sixteenth"):
        graphopt.optimize(program, "prune-ffn{budget=0 metric=kl}", data=data(6))


@example({"a": 0.0, "b": 1.0}, 0.9999999999999999, 1.0)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.0, 1.0), min_size=2),
    st.floats(0.1, 1.0),
    st.floats(0, 3),
)
def test_ratios_keep_their_mean_and_follow_importance(importance, mean, strength) -> None:
    ratios = cfsp_ratios(importance, mean, strength)
    assert sum(ratios.values()) / len(ratios) == pytest.approx(mean, rel=1e-6)
    assert all(0 <= r <= 1 + 1e-9 for r in ratios.values())
    for a in importance:
        for b in importance:
            if importance[a] > importance[b]:
                assert ratios[a] >= ratios[b] - 1e-9, "a block that matters more keeps less"


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert"])
def test_narrow_folders_load_elsewhere(
    name: str, checkpoint: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """A plain checkpoint of the same architecture: its configuration must say the new width."""
    from graphopt.frontends.huggingface import capture_huggingface

    program = graphopt.capture(checkpoint(name))
    done = graphopt.optimize(program, "prune-ffn{fraction=0.25 score=peak}")
    done.save_pretrained(tmp_path / "hf")
    again = capture_huggingface(tmp_path / "hf")
    width = program.anatomy.ffn[0].sizes["width"]
    assert {b.sizes["width"] for b in again.anatomy.ffn} == {width * 3 // 4}
    from graphopt.ir.running.examples import example_inputs

    inputs = example_inputs(program)
    for key, value in done(**inputs).items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(again(**inputs)[key], value, atol=1e-4)


def test_different_widths_are_not_written(
    checkpoint: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    done = graphopt.optimize(
        checkpoint("llama"), "prune-ffn{fraction=0.3 allocation=cfsp strength=3}", data=str(rows)
    )
    assert len({b.sizes["width"] for b in done.anatomy.ffn}) > 1
    with pytest.raises(graphopt.LoweringError, match="different widths"):
        done.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_layers_that_share_weights_get_one_order(captured: Callable[[str], Program]) -> None:
    program = captured("albert")
    from graphopt.ir.running.examples import example_inputs

    inputs = example_inputs(program)
    batches = [dict(inputs) for _ in range(2)]
    done = graphopt.optimize(program, "sort-ffn{score=norm}", data=batches)
    orders = [kept(s["channels"])[s["block"]] for s in done.history[-1]["plan"]["sites"]]
    assert all(torch.equal(orders[0], order) for order in orders)
    first, second = program(**inputs), done(**inputs)
    assert all(
        torch.allclose(first[k], second[k], atol=1e-5) for k in first if isinstance(first[k], torch.Tensor)
    )


def test_channels_that_others_read_are_refused() -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = torch.relu(self.up(self.norm(x)))
            return {"y": x + self.down(hidden), "hidden": hidden}

    with pytest.raises(PassRefusedError, match="are read by output as well"):
        graphopt.optimize(Leaking(), "sort-ffn{score=peak}", inputs=torch.randn(2, 3, 8))
    with pytest.raises(PipelineError, match="say how much to remove"):
        graphopt.optimize(Leaking(), "prune-ffn", inputs=torch.randn(2, 3, 8))
    with pytest.raises(PipelineError, match="needs data"):
        graphopt.optimize(captured(Shape()), "prune-ffn{fraction=0.5}")


def test_pruned_program_shards_and_saves(tmp_path: Path) -> None:
    done = graphopt.optimize(
        captured(Shape(width=16)), "prune-ffn{fraction=0.5 score=peak}, shard-tensor-parallel{size=2}"
    )
    again = graphopt.load(done.save(tmp_path / "saved"))
    assert float((logits(again) - logits(done)).abs().max()) < 1e-12
