"""Exact passes on random transformer configurations; the rule of layer skipping; folding of BatchNorm."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from amounts import examples
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import PassRefusedError, PipelineError
from graphopt.ir.checking.verify import compare_programs
from graphopt.passes import SkipLayers
from graphopt.passes.depth.layer_scores import unified_rule

SETTINGS = settings(max_examples=examples(18), deadline=None, suppress_health_check=list(HealthCheck))


class Attention(nn.Module):
    """Grouped attention, projections stored apart or as one."""

    def __init__(self, heads: int, kv_heads: int, size: int, bias: bool, fused: bool):
        super().__init__()
        width = 32
        self.shape = heads, kv_heads, size
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        self.sizes = sizes
        self.parts = nn.ModuleList(
            [nn.Linear(width, sum(sizes), bias)] if fused else [nn.Linear(width, s, bias) for s in sizes]
        )
        self.o = nn.Linear(heads * size, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, size = self.shape
        parts = self.parts[0](x).split(self.sizes, -1) if len(self.parts) == 1 else [p(x) for p in self.parts]
        q, k, v = (p.view(*x.shape[:2], -1, size).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], heads * size))


class FeedForward(nn.Module):
    """Gated or plain."""

    def __init__(self, gated: bool, bias: bool):
        super().__init__()
        self.gate = nn.Linear(32, 48, bias) if gated else None
        self.up, self.down = nn.Linear(32, 48, bias), nn.Linear(48, 32, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and feed-forward with norms placed in one of four ways."""

    def __init__(self, placement: str, norm: type[nn.Module], attention: Attention, ffn: FeedForward):
        super().__init__()
        self.placement, self.attention, self.ffn = placement, attention, ffn
        self.norms = nn.ModuleList([norm(32) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.norms
        if self.placement == "post":
            x = a(x + self.attention(x))
            return b(x + self.ffn(x))
        if self.placement == "parallel":
            h = a(x)
            return x + self.attention(h) + self.ffn(h)
        if self.placement == "sandwich":
            x = x + b(self.attention(a(x)))
            return x + d(self.ffn(c(x)))
        x = x + self.attention(a(x))
        return x + self.ffn(b(x))


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, str]:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    size = draw(st.sampled_from([4, 8]))
    bias, gated, fused = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    placement = draw(st.sampled_from(["pre", "post", "parallel", "sandwich"]))
    norm = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers = [
        Layer(placement, norm, Attention(heads, kv_heads, size, bias, fused), FeedForward(gated, bias))
        for _ in range(2)
    ]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, placement


@SETTINGS
@given(
    models(), st.sampled_from(["plain", "grouped", "interleaved"]), st.permutations(["fuse", "split", "fold"])
)
def test_exact_passes_keep_the_function_in_any_order(
    drawn: tuple[nn.Module, str], layout: str, order: list[str]
) -> None:
    model, placement = drawn
    program = graphopt.capture(model, torch.randn(3, 7, 32))
    assert program.anatomy.summary() == {"attention": 2, "ffn": 2}, "a block was missed"
    wanted = {"pre": "pre", "post": "post", "parallel": "pre", "sandwich": "sandwich"}[placement]
    assert {b.norms for b in program.anatomy.blocks} == {wanted}
    texts = {
        "fuse": f"fuse-projections{{layout={layout} allow_no_match=true}}",
        "split": "split-projections{allow_no_match=true}",
        "fold": "fold-norms{allow_no_match=true}",
    }
    rewritten = graphopt.optimize(program, ", ".join(texts[step] for step in order))
    for batch, length in ((2, 5), (1, 1)):
        errors = compare_programs(
            program, rewritten, {next(iter(program.signature.inputs)): torch.randn(batch, length, 32)}
        )
        assert max(errors.values()) < 1e-10, "a pass that promises exactness changed the function"


@SETTINGS
@given(models(), st.sampled_from(["plain", "grouped"]))
def test_splitting_undoes_fusing(drawn: tuple[nn.Module, str], layout: str) -> None:
    program = graphopt.capture(drawn[0], torch.randn(3, 7, 32))
    apart = graphopt.optimize(program, "split-projections{allow_no_match=true}")
    together = graphopt.optimize(apart, f"fuse-projections{{layout={layout} where=attention}}")
    again = graphopt.optimize(together, "split-projections")
    assert again.operators["aten.linear"] == apart.operators["aten.linear"], (
        "a fused projection was not split again"
    )


@SETTINGS
@given(st.integers(2, 128), st.integers(1, 64))
def test_unified_rule_keeps_first_last_and_as_many_as_it_says(count: int, speedup: int) -> None:
    keep = int(count / speedup)
    if keep < 2:
        with pytest.raises(PipelineError, match="largest speed-up"):
            unified_rule(count, speedup)
        return
    kept = unified_rule(count, speedup)
    assert len(kept) == keep and {0, count - 1} <= kept
    if speedup == 1:
        assert kept == set(range(count)), "a speed-up of one removes nothing"


def test_unified_rule_index_for_index() -> None:
    assert sorted(unified_rule(30, 5)) == [0, 6, 12, 18, 24, 29]
    assert sorted(unified_rule(30, 3)) == [*range(0, 25, 3), 29]
    assert sorted(unified_rule(30, 10)) == [0, 15, 29]
    assert sorted(unified_rule(32, 3)) == [*range(0, 25, 3), 31]


def test_removed_layers_are_those_of_the_shorter_model() -> None:
    torch.manual_seed(0)
    layers = [
        Layer("pre", nn.LayerNorm, Attention(4, 2, 8, True, False), FeedForward(True, True)) for _ in range(4)
    ]
    x = torch.randn(3, 7, 32)
    shorter = graphopt.optimize(nn.Sequential(*layers).eval(), SkipLayers(layers=[0, 2]), inputs=x)
    expected = nn.Sequential(layers[1], layers[3]).eval()(x)
    assert torch.allclose(shorter(x), expected, atol=1e-5)


def test_budget_takes_the_largest_number_that_holds_it(tmp_path) -> None:
    torch.manual_seed(0)
    layers = [
        Layer("pre", nn.LayerNorm, Attention(4, 2, 8, True, False), FeedForward(True, True)) for _ in range(4)
    ]
    for index in (1, 2):  # two layers that hardly matter
        for part in (layers[index].attention.o, layers[index].ffn.down):
            part.weight.data.mul_(1e-3)
            part.bias.data.mul_(1e-3)
    data = [{"input": torch.randn(2, 7, 32)} for _ in range(4)]
    model = nn.Sequential(*layers).eval()
    result = graphopt.optimize(
        model, SkipLayers(budget=1e-3), inputs=data[0]["input"], data=data, work_dir=tmp_path
    )
    assert sorted(result.report.passes[0].sites) == ["layer.1", "layer.2"]
    assert list(tmp_path.glob("scores-*.json")), "scores were not kept for a later run"
    with pytest.raises(PassRefusedError, match="budget"):
        graphopt.optimize(model, SkipLayers(budget=1e-12), inputs=data[0]["input"], data=data)


@SETTINGS
@given(
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.integers(0, 10**6),
    st.sampled_from(["before", "after"]), st.sampled_from([0, 1]),
)  # fmt: skip
def test_batch_norm_folds_exactly_or_is_refused(
    rank: int, groups: int, bias: bool, affine: bool, seed: int, side: str, padding: int
) -> None:
    torch.manual_seed(seed)
    conv = getattr(nn, f"Conv{rank}d")(
        4, 8 if side == "before" else 4, 3, padding=padding, groups=groups, bias=bias
    )
    norm = getattr(nn, f"BatchNorm{rank}d")(8 if side == "before" else 4, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1e-4, 2.0)
    if affine:
        nn.init.normal_(norm.weight)  # negative scales too
        nn.init.normal_(norm.bias)
    model = nn.Sequential(*((conv, norm) if side == "before" else (norm, conv))).eval()
    x = torch.randn(2, 4, *[7] * rank)
    program = graphopt.capture(model, x)
    if side == "after" and padding:
        with pytest.raises(PassRefusedError, match="pads with zeros"):
            graphopt.optimize(program, "fold-norms")
        return
    folded = graphopt.optimize(program, "fold-norms")
    assert "aten.batch_norm" not in folded.operators
    assert max(compare_programs(program, folded, program.bind((x,))).values()) < 1e-10
