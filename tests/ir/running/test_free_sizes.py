"""Sizes that vary stay sizes: no rule and no pass may write the example's number in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from branch_networks import randomised, repvgg_block
from builders import Shape, Transformer, tokens
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import graphopt
from graphopt.ir import compat
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.facts import Capture
from graphopt.ir.program import Program
from graphopt.passes.framework.registry import BUILT_IN

D = torch.float64


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=D)


def heads(b: int, n: int, s: int) -> tuple[Tensor, ...]:
    """Queries, keys and values whose batch, heads, lengths and head size are all free."""
    return draw(b, 2 * n, s, 2 * s), draw(b, 2 * n, s + 3, 2 * s), draw(b, 2 * n, s + 3, 2 * s)


def matrix(b: int, n: int, s: int) -> tuple[Tensor, ...]:
    return (draw(b, n, 2 * s),)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def by_a_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1], -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5)


def rotated(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def scattered(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, -1] = 0.0
    y.transpose(0, 1)[0, :, : x.shape[-1] // 2] += 1.0
    y[..., 1:].mul_(2)
    return y


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def shared(x: Tensor) -> Tensor:
    return x / x.shape[-1] + x.sum(-1, keepdim=True) / (x.shape[1] * x.shape[2])


def windows(x: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (2, 0))
    return F.avg_pool1d(padded, 3, 1).transpose(1, 2)


def routed(x: Tensor, w: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen = torch.softmax(flat @ w.T, -1).topk(2, -1)
    return (w[chosen] * weights[..., None]).sum(1).reshape(x.shape)


Draw = Callable[[int, int, int], tuple[Tensor, ...]]
CASES: dict[str, tuple[Callable[..., Any], Draw]] = {
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), heads),
    "attention, causal": (lambda q, k, v: F.scaled_dot_product_attention(k, k, v, is_causal=True), heads),
    "attention, given its scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), heads),
    "attention, masked": (masked, heads),
    "attention, written out": (written, heads),
    "attention, scaled by a size": (by_a_size, heads),
    "attention, grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True, scale=1.0), heads,
    ),
    "attention, repeated": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, *(t[:, ::2].repeat_interleave(2, 1) for t in (k, v)), scale=1.0
        ),
        heads,
    ),
    "attention of three dimensions": (
        lambda q, k, v: F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v)), scale=1.0), heads,
    ),
    "heads side by side": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2), heads,
    ),
    "rotation": (rotated, matrix),
    "writes through views": (scattered, matrix),
    "root mean square": (normed, matrix),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), matrix),
    "divided by sizes": (shared, matrix),
    "halves": (lambda x: torch.mul(*x.chunk(2, -1)), matrix),
    "halves by their size": (lambda x: torch.mul(*x.split(x.shape[-1] // 2, -1)), matrix),
    "unbound": (lambda x: x.unflatten(-1, (2, -1)).unbind(-2)[1], matrix),
    "flattened and back": (lambda x: (x.reshape(-1, x.shape[-1]) * 2).view(x.shape), matrix),
    "moved": (lambda x: x.movedim(0, 1).mT.swapaxes(0, 2).permute(1, 0, 2).contiguous() + 1, matrix),
    "expanded": (lambda x: x[:, :1].expand(-1, x.shape[1], -1) - x, matrix),
    "rolled": (lambda x: torch.roll(x, 1, 1) + x.flip(0), matrix),
    "padded and pooled": (windows, matrix),
    "counted": (lambda x: torch.ones(x.shape[0], x.shape[1], 1, dtype=x.dtype).cumsum(1) * x, matrix),
    "last token": (lambda x: x[:, -1:] + x[:, x.shape[1] - 1 :], matrix),
    "product with a matrix given": (lambda x, w: F.linear(x, w), lambda b, n, s: (draw(b, n, 2 * s), draw(n + 1, 2 * s))),
    "rows chosen by score": (routed, lambda b, n, s: (draw(b, n, 2 * s), draw(n + 4, 2 * s))),
    "einsum": (lambda x, y: torch.einsum("bns,bms->bnm", x, y), lambda b, n, s: (draw(b, n, s), draw(b, n + 1, s))),
}  # fmt: skip


class Function(nn.Module):
    """A function of two or three tensors as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        return self.function(*(t for t in (x, y, z) if t is not None))


def exported(name: str) -> tuple[torch.export.ExportedProgram, Function, Draw]:
    function, make = CASES[name]
    example = make(3, 5, 4)
    shapes = {n: dict.fromkeys(range(t.dim()), Dim.AUTO) for n, t in zip("xyz", example, strict=False)}
    model = Function(function).eval()
    return torch.export.export(model, example, dynamic_shapes=shapes), model, make


def test_the_scale_of_attention_follows_its_head_size() -> None:
    """Wrong if the scale of the example's head size were kept for another."""
    program = graphopt.capture(exported("attention")[0])
    assert list(program.facts[Capture].plain_attention) == [
        "scaled_dot_product_attention: its scale depends on a head size that varies"
    ]
    fixed = graphopt.capture(Function(CASES["attention"][0]), heads(3, 5, 4), dynamic=None)
    assert fixed.operators == {"graphopt.attention": 1}


def sizes_of(graph: torch.fx.Graph) -> list[str]:
    """Sizes of the inputs, as the graph has them."""
    return [str(tuple(n.meta["val"].shape)) for n in graph.find_nodes(op="placeholder")]


def state(program: Program) -> tuple[Any, ...]:
    """What a size that became a number would change."""
    env = program.mode.shape_env
    ranges = {name: compat.symbol_range(program.mode, symbol) for symbol, name in program.symbols.items()}
    return program.text(), dict(program.symbols), ranges, sizes_of(program.graph), len(env.guards)


@pytest.mark.parametrize("name", CASES)
def test_canonical_form_keeps_every_size_free(name: str) -> None:
    """Wrong if a rule wrote down the example's head size, length or batch."""
    original, model, make = exported(name)
    program = graphopt.capture(original)
    assert sizes_of(program.graph) == sizes_of(original.graph)
    assert program.symbols.keys() >= {
        s for s in original.range_constraints if str(s) in str(sizes_of(original.graph))
    }
    for b, n, s in ((3, 5, 4), (2, 7, 8), (4, 3, 5)):
        x = make(b, n, s)
        torch.testing.assert_close(program(*x), model(*x), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    decoder = graphopt.capture(Transformer(Shape(width=12)), tokens(3, 7), compare=False)
    network = nn.Sequential(repvgg_block(3, 8), repvgg_block(8, 8), nn.Conv2d(8, 4, 3, padding=1))
    images = graphopt.capture(randomised(network).double(), draw(3, 3, 8, 9), compare=False)
    return {"decoder": decoder, "images": images}


OPTIONS = {
    "skip-layers": "layers=[0]", "prune-ffn": "fraction=0.5", "trim-vocabulary": "keep=8", "quantize": "weights=8",
    "stream-convolutions": "axis=size_2", "split-ffn": "score=peak", "attach-early-exit": "layers=[0]",
    "shard-tensor-parallel": "size=2", "group-heads": "size=2", "prune-experts": "fraction=0.5",
    "drop-sync-points": "fraction=0.5", "freeze-dial": "dial=delta",
}  # fmt: skip


@pytest.mark.parametrize("which", ["decoder", "images"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_passes_keep_every_size_free(programs: dict[str, Program], name: str, which: str) -> None:
    """Wrong if a pass asked for the value of a size that varies, or left what it asked in the program."""
    program = programs[which]
    before = state(program)
    try:
        after = graphopt.optimize(program, f"{name}{{{OPTIONS.get(name, '')} allow_no_match=true}}")
    except graphopt.GraphoptError as refusal:
        assert "sizes in it vary" not in str(refusal)
        assert "has no option" not in str(refusal), "the case tries nothing"
        after = None
    assert state(program) == before
    if after is None:
        return
    for symbol, size in program.symbols.items():
        assert after.symbols[symbol] == size
        assert compat.symbol_range(after.mode, symbol) == compat.symbol_range(program.mode, symbol)
    if after.report.passes[0].contract == "exact":
        for b, n in ((2, 5), (4, 9)):
            inputs = tokens(b, n) if which == "decoder" else program.bind((draw(b, 3, n + 3, n),))
            assert max(compare_programs(program, after, inputs).values()) < 1e-10
