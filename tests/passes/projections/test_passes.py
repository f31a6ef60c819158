"""Fusing and splitting projections, and folding norms, on transformers in every storage and spelling."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import pytest
import torch
import zoo
from amounts import examples
from builders import D, Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.frontends.compare import compare_outputs
from graphopt.ir.checking.verify import compare_programs, verify
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes import FoldNorms, FuseProjections, Pass, SplitProjections
from graphopt.passes.framework.manager import run_pipeline


@lru_cache(maxsize=64)
def captured(shape: Shape) -> Program:
    return graphopt.capture(Transformer(shape), tokens(2, 6))


def run(program: Program, *passes: Pass) -> Program:
    """Run passes, verify every node of what comes out, and compare whole programs at two sizes."""
    after = run_pipeline(program, passes, Context())
    verify(after)
    for size in ((2, 6), (3, 9)):
        errors = compare_programs(program, after, tokens(*size))
        assert max(errors.values()) < 1e-10, after.text()
    return after


def weights_as_used(program: Program) -> dict[str, torch.Tensor]:
    """Return the matrix of each linear, computed, keyed by the sum of what it holds."""
    from graphopt.ir.running.execute import interpret
    from graphopt.ir.schema import is_operator

    found: dict[str, torch.Tensor] = {}
    for node in program.nodes:
        if is_operator(node, "aten.linear"):
            matrix = node.args[1]
            held = program.weights.get(matrix.name)
            value = (
                held.source.load()
                if held
                else interpret(program, {}, record=[matrix], stop=True)[matrix.name]
            )
            found[f"{value.double().sum():.9f} {tuple(value.shape)}"] = value
    return found


@st.composite
def shapes(draw: Any) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    qkv = draw(st.sampled_from(["separate", "plain", "grouped", "interleaved"]))
    return Shape(
        layers=1,
        heads=4,
        kv_heads=4 if qkv == "interleaved" else kv_heads,
        head_size=draw(st.sampled_from([2, 4])),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer", "written_rms", "written_layer"])),
        placement=draw(st.sampled_from(["pre", "post", "sandwich", "parallel"])),
        qkv=qkv,
        gate_up=draw(st.sampled_from(["separate", "plain", "interleaved"])),
        spelling=draw(st.sampled_from(["linear", "conv1d", "transposed"])),
        tied=draw(st.booleans()),
        rotary=draw(st.booleans()),
        causal=draw(st.booleans()),
    )


EXACT: list[Pass] = [
    FuseProjections(allow_no_match=True),
    FuseProjections(layout="grouped", allow_no_match=True),
    FuseProjections(layout="interleaved", allow_no_match=True),
    SplitProjections(allow_no_match=True),
    FoldNorms(allow_no_match=True),
    FoldNorms(untie=True, allow_no_match=True),
]


@settings(max_examples=examples(27), deadline=None)
@given(shape=shapes(), steps=st.lists(st.sampled_from(EXACT), min_size=1, max_size=4))
def test_random_pipelines_on_random_transformers(shape: Shape, steps: list[Pass]) -> None:
    """Wrong if an exact pass changed a value in some storage, or left a graph the next could not read."""
    program = captured(shape)
    assert program.anatomy.summary() == {"attention": 1, "ffn": 1}
    after = run(program, *steps)
    assert after.anatomy.summary() == {"attention": 1, "ffn": 1}
    block = after.anatomy.attention[0]
    assert (block.sizes["heads"], block.sizes["kv_heads"]) == (4, shape.kv_heads)
    assert compare_outputs(after, Transformer(shape), tokens(2, 7), tokens(2, 7)["attention_mask"]) < 1e-10


@pytest.mark.parametrize("layout", ["plain", "grouped", "interleaved"])
@pytest.mark.parametrize("spelling", ["linear", "conv1d"])
def test_fuse_then_split_gives_the_same_matrices(layout: str, spelling: str) -> None:
    """Wrong if a layout were written by one rule and read by another."""
    shape = Shape(layers=1, kv_heads=4 if layout == "interleaved" else 2, bias=True, spelling=spelling)
    program = captured(shape)
    fused = run(program, FuseProjections(layout=layout))
    assert fused.operators["aten.linear"] == program.operators["aten.linear"] - (
        2 if layout == "grouped" else 3
    )
    apart = run(fused, SplitProjections())
    before, after = weights_as_used(program), weights_as_used(apart)
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[key], after[key]) for key in before), "rows came back in another order"
    assert {b.kind: b.norms for b in apart.anatomy.blocks} == {"attention": "pre", "ffn": "pre"}


@pytest.mark.parametrize("qkv", ["plain", "grouped", "interleaved"])
def test_split_then_fuse_gives_the_stored_matrix(qkv: str) -> None:
    """Wrong if fusing in the layout of a checkpoint did not give that checkpoint's rows."""
    shape = Shape(layers=1, kv_heads=4 if qkv == "interleaved" else 2, qkv=qkv, gate_up="plain")
    program = captured(shape)
    apart = run(program, SplitProjections())
    block = apart.anatomy.attention[0]
    assert len({block.parts[name] for name in ("q", "k", "v")}) == 3
    joined = run(apart, FuseProjections(layout=qkv, where="attention"))
    assert set(weights_as_used(program)) & set(weights_as_used(joined)), "the stored matrix did not come back"
    stored = Transformer(shape).blocks[0].mix.joined.weight.detach()
    assert any(m.shape == stored.shape and torch.equal(m, stored) for m in weights_as_used(joined).values())


def test_nothing_is_left_to_do_after_a_pass() -> None:
    """Wrong if a pass matched what it had made itself."""
    program = captured(Shape(layers=2, qkv="grouped", gate_up="interleaved"))
    apart = run(program, SplitProjections())
    with pytest.raises(graphopt.PassRefusedError, match="nothing of the kind"):
        run(apart, SplitProjections())
    fused = run(apart, FuseProjections())
    with pytest.raises(graphopt.PassRefusedError, match="are fused already"):
        run(fused, FuseProjections())
    folded = run(program, FoldNorms())
    with pytest.raises(graphopt.PassRefusedError, match="nothing of the kind"):
        run(folded, FoldNorms())


REFUSALS: dict[str, tuple[Shape, Pass, str]] = {
    "grouped feed-forward": (Shape(layers=1), FuseProjections(layout="grouped", where="ffn"), "has no groups"),
    "interleaved groups": (
        Shape(layers=1), FuseProjections(layout="interleaved", where="attention"), "do not alternate one by one",
    ),
    "joined already": (Shape(layers=1, qkv="plain"), FuseProjections(where="attention"), "are fused already"),
    "no gate": (Shape(layers=1, gated=False), FuseProjections(where="ffn"), "there is no gate projection"),
    "nothing joined": (Shape(layers=1), SplitProjections(), "nothing of the kind"),
    "read by the stream": (Shape(layers=1, placement="post"), FoldNorms(which="rms-norm"), "has no matrix"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_reason(name: str) -> None:
    """Wrong if a pass that cannot act here did something, or could not say why it did nothing."""
    shape, step, reason = REFUSALS[name]
    if name == "read by the stream":
        shape = dataclasses.replace(shape, tied=True)
    with pytest.raises(graphopt.PassRefusedError, match=reason):
        run_pipeline(captured(shape), [step], Context())


def test_sites_that_are_left_alone_say_where_they_are() -> None:
    """Wrong if a refusal among sites that were taken had no reason or line."""
    program = captured(Shape(layers=2))
    report = run(program, FuseProjections(layout="grouped")).report
    assert report is not None
    (entry,) = report.passes
    assert entry.sites == ["attention.0", "attention.1"]
    assert {r.block: r.reason for r in entry.refused}["ffn.0"].startswith("a feed-forward has no groups")
    assert "builders.py" in entry.refused[0].source


class Two(nn.Module):
    """Two projections of one value, with more that a test decides."""

    def __init__(self, change: str):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=D) / 3)

        self.change = change
        self.norm, self.joined = draw(8), draw(24, 8)
        self.gate, self.up, self.down, self.bias = draw(12, 8), draw(12, 8), draw(8, 12), draw(8)

    def forward(self, x: torch.Tensor) -> Any:
        h = F.layer_norm(x, (8,), self.norm, self.bias)
        if self.change == "norm read elsewhere":
            return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down), h
        if self.change == "other inputs":
            return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h * 2, self.up), self.down)
        if self.change == "matrix from the input":
            return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up * x.mean()), self.down)
        if self.change == "matrix used twice":
            return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.gate + 0), self.down)
        both = F.linear(h, self.joined)
        if self.change == "whole result read":
            return x + F.linear(F.silu(both[..., :12]) * both[..., 12:], self.down), both
        if self.change == "part read whole and in parts":
            gate, up = both.chunk(2, -1)
            return x + F.linear(F.silu(gate) * torch.cat((up[..., 6:], up[..., :6]), -1) * up, self.down)
        gate, up = both.chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


HAND: list[tuple[str, Pass, str]] = [
    ("other inputs", FuseProjections(), "read different values"),
    ("matrix from the input", FuseProjections(), "depends on the input"),
    ("norm read elsewhere", FoldNorms(), "has no matrix to absorb its weight"),
    ("whole result read", SplitProjections(), "whole result is read"),
    ("part read whole and in parts", SplitProjections(), "both whole and in parts"),
]


@pytest.mark.parametrize(("change", "step", "reason"), HAND, ids=[h[0] for h in HAND])
def test_guards_on_what_else_is_read(change: str, step: Pass, reason: str) -> None:
    """Wrong if a value that another reader needs were rewritten under it."""
    x = torch.randn(2, 5, 8, dtype=D, generator=torch.Generator().manual_seed(0))
    program = graphopt.capture(Two(change), x)
    before = program.text()
    with pytest.raises(graphopt.PassRefusedError, match=reason):
        run_pipeline(program, [step], Context())
    assert program.text() == before


def test_tied_weights_are_left_alone_unless_untied() -> None:
    """Wrong if folding into a head scaled the embedding that shares its table."""
    program = captured(Shape(layers=1, tied=True))
    report = run(program, FoldNorms()).report
    assert report is not None
    assert any("untie=true" in r.reason for r in report.passes[0].refused)
    assert len(report.passes[0].sites) == 2
    apart = run(program, FoldNorms(untie=True))
    assert apart.report is not None
    assert len(apart.report.passes[0].sites) == 3
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = Transformer(Shape(layers=1, tied=True))(**ids)["logits"]
    assert torch.allclose(apart(**ids)["logits"], expected, rtol=1e-10, atol=1e-10)


ZOO = ["llama_tied", "phi3", "gpt2", "gpt_neox", "falcon", "gemma2", "bert", "olmo2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo_through_all_exact_passes(name: str) -> None:
    """Wrong if a real architecture had a layout, tie or norm that no hand-written model has."""
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    given_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = graphopt.capture(zoo.make(name), given_inputs)
    names = set(program.signature.inputs)
    for steps in (
        [SplitProjections(allow_no_match=True), FoldNorms(untie=True, allow_no_match=True)],
        [FuseProjections(allow_no_match=True), SplitProjections(allow_no_match=True)],
        [SplitProjections(allow_no_match=True), FuseProjections(layout="grouped", allow_no_match=True)],
    ):
        after = run_pipeline(program, steps, Context())
        verify(after)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        bound = program.bind(
            (), {k: v for k, v in {"input_ids": ids, "attention_mask": mask}.items() if k in names}
        )
        errors = compare_programs(program, after, bound)
        assert max(errors.values()) < 1e-10, (name, steps, errors)
