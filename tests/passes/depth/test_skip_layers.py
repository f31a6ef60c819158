"""Layers leave the stream: by number, by rule, by score and by budget, as if they had never been there."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import examples
from builders import Layer, Shape, Transformer, tokens
from drawn_decoders import SIZES, Decoder, alike, decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.ir.checking.verify import verify
from graphopt.ir.program import Program
from graphopt.measure.context import Context, Silent
from graphopt.passes import FoldNorms, FuseProjections, SkipLayers
from graphopt.passes.depth.layer_scores import unified_rule
from graphopt.passes.framework.manager import run_pipeline

PLACEMENTS = ["pre", "post", "sandwich", "parallel"]


def shape(placement: str, layers: int = 4) -> Shape:
    return Shape(layers=layers, placement=placement)


@lru_cache(maxsize=16)
def captured(placement: str, layers: int = 4) -> Program:
    return graphopt.capture(Transformer(shape(placement, layers)), tokens(2, 6))


def data(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=seed) for seed in range(count)]


class Less(nn.Module):
    """A layer of the hand-written transformer without its attention, or without its feed-forward."""

    def __init__(self, layer: Layer, attention: bool, ffn: bool):
        super().__init__()
        self.layer, self.attention, self.ffn = layer, attention, ffn

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        layer, norms = self.layer, self.layer.norms
        if layer.placement == "parallel":
            h = norms[0](x)
            x = x + layer.mix(h, mask) if self.attention else x
            return x + layer.think(h) if self.ffn else x
        if layer.placement == "post":
            x = norms[0](x + layer.mix(x, mask)) if self.attention else x
            return norms[1](x + layer.think(x)) if self.ffn else x
        if layer.placement == "sandwich":
            x = x + norms[1](layer.mix(norms[0](x), mask)) if self.attention else x
            return x + norms[3](layer.think(norms[2](x))) if self.ffn else x
        x = x + layer.mix(norms[0](x), mask) if self.attention else x
        return x + layer.think(norms[1](x)) if self.ffn else x


def without(placement: str, unit: str, gone: list[int], layers: int = 4) -> Transformer:
    """Return the same transformer built without some layers, attentions or feed-forwards."""
    return built_without(Transformer(shape(placement, layers)), unit, gone)


def built_without(model: Transformer, unit: str, gone: list[int]) -> Transformer:
    """Return a transformer, which is used up, without some layers, attentions or feed-forwards."""
    model.blocks = nn.ModuleList(
        Less(block, not (unit == "attention" and i in gone), not (unit == "ffn" and i in gone))
        for i, block in enumerate(model.blocks)
        if unit != "layer" or i not in gone
    )
    return model


def skipped(program: Program, context: Context | None = None, **options: Any) -> Program:
    after = run_pipeline(program, [SkipLayers(**options)], context or Context())
    verify(after)
    return after


def removed(program: Program, unit: str = "layer") -> list[int]:
    assert program.report is not None
    return sorted(int(site.removeprefix(unit + ".")) for site in program.report.passes[-1].sites)


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_left_is_the_model_built_without_it(placement: str, unit: str) -> None:
    """Wrong if a norm, a mask or the other branch of a parallel layer went or stayed with the wrong block."""
    for gone in ([1, 2], [0], [0, 3]):
        program = skipped(captured(placement), layers=gone, unit=unit)
        model = without(placement, unit, gone)
        for given_tokens in (tokens(2, 6), tokens(3, 9, seed=1)):
            expected = model(**given_tokens)["logits"]
            assert torch.allclose(program(**given_tokens)["logits"], expected, rtol=1e-10, atol=1e-10)
        expected.sum().backward()
        kept = [weight for weight in model.parameters() if weight.grad is not None]
        assert len(program.weights) == len(kept), "weights of what is gone stayed, or others went"


@settings(max_examples=examples(18), deadline=None)
@given(
    decoders(),
    st.sampled_from(["layer", "attention", "ffn"]),
    st.sampled_from(["layers", "remove", "speedup"]),
    st.sampled_from(["always", "decode"]),
    st.data(),
)
def test_any_decoder_is_the_one_built_without(
    drawn: Decoder, unit: str, how: str, phase: str, draw: st.DataObject
) -> None:
    """Wrong if another unit went than the plan says, or one that is skipped after the prompt left anything behind."""
    count = drawn.shape.layers
    if how == "speedup" and count < 3:
        how = "remove"  # the rule keeps two
    if how == "layers":
        numbers = st.lists(st.integers(0, count - 1), min_size=1, max_size=count - 1, unique=True)
        options: dict[str, Any] = {how: draw.draw(numbers)}
    else:
        options = {how: draw.draw(st.integers(1, count - 1)) if how == "remove" else 1.5}
    program = drawn.program
    after = graphopt.optimize(
        program, SkipLayers(unit=unit, phase=phase, **options), data=data(), verify="off"
    )
    gone = removed(after, unit)
    if how == "layers":
        assert gone == sorted(options[how])
    elif how == "remove":
        assert len(gone) == options[how]
    else:
        assert gone == [n for n in range(count) if n not in unified_rule(count, 1.5)]
    model = built_without(drawn.model, unit, gone)
    for size in SIZES:
        given_tokens = tokens(*size, seed=drawn.seed)
        with torch.no_grad():
            expected = model(**given_tokens)["logits"]
        if phase == "decode":
            assert alike(after(**given_tokens)["logits"], program(**given_tokens)["logits"])
            assert alike(after(**given_tokens, decoding=1)["logits"], expected)
        else:
            assert alike(after(**given_tokens)["logits"], expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_exact_passes_run_before_and_after(placement: str) -> None:
    """Wrong if a shorter program were no longer one that other passes can read."""
    short = without(placement, "layer", [1])
    for order in ([SkipLayers(layers=[1]), FuseProjections(), FoldNorms(allow_no_match=True)],
                  [FuseProjections(), FoldNorms(allow_no_match=True), SkipLayers(layers=[1])]):  # fmt: skip
        program = run_pipeline(captured(placement), order, Context())
        with torch.no_grad():
            expected = short(**tokens(2, 7))["logits"]
        assert torch.allclose(program(**tokens(2, 7))["logits"], expected, rtol=1e-9, atol=1e-9)
        assert len(program.anatomy.layers) == 3


def published_rule(count: int, target: int) -> set[int]:
    """The published code of Unified Layer Skipping, line for line."""
    number = int(count / target)
    keep = {0, count - 1}
    step = int(count / (number - 1))
    for i in range(1, count - 1):
        if i % step == 0 and len(keep) < number:
            keep.add(i)
    return keep


@pytest.mark.parametrize(
    ("count", "speedup", "kept"),
    [
        (30, 5, [0, 6, 12, 18, 24, 29]),
        (30, 3, [0, 3, 6, 9, 12, 15, 18, 21, 24, 29]),
        (30, 10, [0, 15, 29]),
        (32, 3, [0, 3, 6, 9, 12, 15, 18, 21, 24, 31]),
    ],
)
def test_the_unified_rule_index_for_index(count: int, speedup: int, kept: list[int]) -> None:
    """Wrong if a balanced or rounded variant were used in place of the published one."""
    assert sorted(unified_rule(count, speedup)) == kept


@settings(deadline=None)
@given(count=st.integers(2, 128), speedup=st.one_of(st.integers(1, 70), st.floats(1, 70)))
def test_the_unified_rule_keeps_what_it_promises(count: int, speedup: float) -> None:
    """Wrong if the first or last layer could go, or another number were kept than asked for."""
    number = int(count / speedup)
    if number < 2:
        with pytest.raises(graphopt.PipelineError, match="largest speed-up"):
            unified_rule(count, speedup)
        return
    kept = unified_rule(count, speedup)
    assert len(kept) == number
    assert {0, count - 1} <= kept <= set(range(count))
    assert kept == published_rule(count, speedup)  # type: ignore[arg-type]
    assert speedup != 1 or kept == set(range(count))


def test_the_rule_on_a_program() -> None:
    """Wrong if the option did not reach the rule, or a speed-up of one took something away."""
    program = skipped(captured("pre", 6), speedup=2.0)
    assert removed(program) == sorted(set(range(6)) - unified_rule(6, 2))
    with pytest.raises(graphopt.PassRefusedError, match="matched nothing"):
        skipped(captured("pre", 6), speedup=1)
    with pytest.raises(graphopt.PipelineError, match="largest speed-up here is 3"):
        skipped(captured("pre", 6), speedup=4)


def streams(model: Transformer, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the stream before the first layer and after each."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        x = F.embedding(batch["input_ids"], model.table)
        found.append(x)
        for block in model.blocks:
            x = block(x, batch["attention_mask"])
            found.append(x)
    return found


def distance(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor, score: str) -> float:
    cosine = F.cosine_similarity(first, second, dim=-1)[mask.bool()]
    return float((torch.arccos(cosine) / torch.pi if score == "angular" else 1 - cosine).mean())


@pytest.mark.parametrize("score", ["block-influence", "angular"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scores_are_distances_along_the_stream(placement: str, score: str) -> None:
    """Wrong if padding counted, or a layer were scored by what another reads or writes."""
    batches = data(2)[:1]
    plan = SkipLayers(remove=2, score=score).plan(captured(placement), Context(batches))
    values = streams(Transformer(shape(placement)), batches[0])
    expected = [distance(a, b, batches[0]["attention_mask"], score) for a, b in itertools.pairwise(values)]
    assert [plan.scores[f"layer.{i}"] for i in range(4)] == pytest.approx(expected, rel=1e-9)
    lowest = sorted(range(4), key=lambda i: expected[i])[:2]
    assert sorted(int(s.block[6:]) for s in plan.sites) == sorted(lowest)
    pair = SkipLayers(remove=2, score=score, search="contiguous").plan(captured(placement), Context(batches))
    runs = [distance(values[i], values[i + 2], batches[0]["attention_mask"], score) for i in range(3)]
    best = min(range(3), key=lambda i: runs[i])
    assert [s.block for s in pair.sites] == [f"layer.{best}", f"layer.{best + 1}"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_greedy_search_scores_what_is_left(placement: str) -> None:
    """Wrong if after a removal the next layer were scored by the stream as it was before."""
    batches = data(2)[:1]
    mask = batches[0]["attention_mask"]
    plan = SkipLayers(remove=2, unit="attention", search="greedy").plan(captured(placement), Context(batches))
    first, second = sorted((s.block for s in plan.sites), key=lambda name: list(plan.scores).index(name))
    gone = int(first.removeprefix("attention."))
    model = without(placement, "attention", [gone])
    x, found = F.embedding(batches[0]["input_ids"], model.table), {}
    with torch.no_grad():
        for index, less in enumerate(model.blocks):
            alone = Less(less.layer, True, placement == "parallel")
            found[f"attention.{index}"] = distance(x, alone(x, mask), mask, "block-influence")
            x = less(x, mask)
    del found[first]
    assert second == min(found, key=lambda name: found[name])
    assert plan.scores[second] == pytest.approx(found[second], rel=1e-9)


def test_a_budget_takes_as_many_as_hold_it() -> None:
    """Wrong if fewer layers were removed than the budget allows, or more."""
    program, context = captured("pre"), Context(data())
    order = [
        f"layer.{i}"
        for i in sorted(
            range(4), key=lambda i: SkipLayers(remove=1).plan(program, context).scores[f"layer.{i}"]
        )
    ]
    losses = []
    for number in (1, 2, 3):
        gone = [int(name[6:]) for name in order[:number]]
        losses.append(context.loss(skipped(program, layers=gone), program, metric="kl"))
    for budget in (losses[0] * 1.01, max(losses[:2]) * 1.01):
        expected = 0
        while expected < 3 and losses[expected] <= budget:
            expected += 1
        after = skipped(program, Context(data()), budget=budget, metric="kl")
        assert len(removed(after)) == expected
        assert after.report is not None
        assert after.report.passes[-1].metric["relative loss"] <= budget
    with pytest.raises(graphopt.PassRefusedError, match="costs more than the budget"):
        skipped(program, Context(data()), budget=1e-9, metric="kl")
    with pytest.raises(graphopt.ContractError, match="its budget is"):
        skipped(program, Context(data()), remove=2, budget=1e-9, metric="kl")


@pytest.mark.parametrize("search", ["one-shot", "greedy", "contiguous"])
@pytest.mark.parametrize("score", ["kl", "cosine", "angular"])
def test_every_search_with_every_kind_of_score(search: str, score: str) -> None:
    """Wrong if one of the ways that the options promise did not work on a plain model."""
    after = skipped(captured("pre"), Context(data(2)), remove=2, search=search, score=score)
    numbers = removed(after)
    assert len(numbers) == 2
    assert search != "contiguous" or numbers[1] == numbers[0] + 1


class Counted(Silent):
    """Progress that ends the run after some steps, as a user would."""

    def __init__(self, stop: int | None = None):
        self.steps, self.stop = 0, stop

    def step(self, note: str = "") -> None:
        self.steps += 1
        if self.stop is not None and self.steps >= self.stop:
            raise KeyboardInterrupt


def test_scores_are_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if an interrupted run started over, or scores were taken from other weights or data."""
    program, count = captured("pre"), 0
    original = Context.evaluate

    def evaluate(self: Context, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Context, "evaluate", evaluate)
    step = SkipLayers(remove=1, score="kl")

    def plan(program: Program, batches: Any, progress: Counted | None = None) -> tuple[Any, int]:
        nonlocal count
        count = 0
        found = step.plan(program, Context(batches, work_dir=tmp_path, progress=progress or Counted()))
        return found, count - 1  # one evaluation is the estimate of the time

    with pytest.raises(KeyboardInterrupt):
        plan(program, data(2), Counted(stop=2))
    resumed, evaluations = plan(program, data(2))
    assert evaluations == 2, "the two scores that were there were computed again"
    again, evaluations = plan(program, data(2))
    assert evaluations == 0
    assert again.scores == resumed.scores
    assert plan(program, data(3))[1] == 4, "scores of other data were taken"
    other = graphopt.capture(Transformer(shape("pre"), seed=1), tokens(2, 6))
    assert plan(other, data(2))[1] == 4, "scores of other weights were taken"
    fresh = step.plan(program, Context(data(2)))
    assert fresh.scores == pytest.approx(resumed.scores)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layers": [4]}, graphopt.PipelineError, "there is no layer 4; they are numbered 0 to 3"),
    ({"layers": [-1]}, graphopt.PipelineError, "there is no layer -1"),
    ({"layers": [0, 1, 2, 3]}, graphopt.PassRefusedError, "nothing would be left"),
    ({"remove": 4}, graphopt.PassRefusedError, "one must be left"),
    ({"layers": [1, 1]}, graphopt.PipelineError, "lists a number twice"),
    ({"layers": [1], "remove": 2}, graphopt.PipelineError, "layers and remove say the same thing twice"),
    ({}, graphopt.PipelineError, "say what to remove"),
    ({"remove": 1}, graphopt.PipelineError, "needs data"),
    ({"speedup": 3}, graphopt.PipelineError, "largest speed-up here is 2"),
]


@pytest.mark.parametrize(("options", "kind", "reason"), REFUSED)
def test_refusals(options: dict[str, Any], kind: type[Exception], reason: str) -> None:
    """Wrong if an impossible request did something else than say so."""
    program = captured("pre")
    before = program.text()
    with pytest.raises(kind, match=reason):
        skipped(program, **options)
    assert program.text() == before


def test_a_network_without_a_stream_is_refused() -> None:
    """Wrong if layers were invented where nothing repeats on a stream."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    program = graphopt.capture(model, torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(graphopt.PassRefusedError, match="there is no layer on the residual stream"):
        skipped(program, layers=[0])
