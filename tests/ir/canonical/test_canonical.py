"""Canonicalisation: whatever a model's spelling, the same operators that compute the same values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_networks import SIZE, STEPS, Chain, D, Function, Step, draw
from torch import nn
from torch.nn import functional as F

from graphopt.frontends.compare import compare_outputs
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.canonical import canonicalise
from graphopt.ir.checking.verify import verify
from graphopt.ir.program import Program
from graphopt.ir.rewriting.cleanup import DROPOUTS
from graphopt.ir.schema import is_mutable


def step(**operators: int) -> Callable[[Step], Step]:
    """Register a spelling of (batch, length, 8) -> same, and the operators it must become."""

    def register(function: Step) -> Step:
        STEPS[function.__name__] = (function, {name.replace("__", "."): n for name, n in operators.items()})
        return function

    return register


@step(aten__linear=1)
def matmul_transposed(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ p.w.T + p.b


@step(aten__linear=1)
def matmul_plain(p: Any, x: torch.Tensor) -> torch.Tensor:
    return p.b + torch.matmul(x, p.w)


@step(aten__linear=1)
def conv1d_of_gpt2(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(p.b, x.view(-1, x.size(-1)), p.w).view(x.size())


@step(aten__linear=1)
def flattened_mm(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.flatten(0, 1), p.w.t()).unflatten(0, x.shape[:2])


@step(aten__linear=1)
def einsum_linear(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bsi,oi->bso", x, p.w)


@step(aten__linear=2)
def two_linears(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, p.w, p.b)), p.u)


@step(aten__contiguous=0, aten__clone=0, aten__view=0, aten__transpose=0)
def views_there_and_back(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = x.transpose(1, 2).contiguous().mT.clone()
    h = h.view(h.shape[0], h.shape[1], 2, 4).swapaxes(2, 3).movedim(-1, 2).reshape(x.shape)
    return h.unsqueeze(1).squeeze(1).detach() * p.b


@step(aten__to=0, aten__type_as=0)
def casts_to_its_own_type(p: Any, x: torch.Tensor) -> torch.Tensor:
    return (x.to(D).double().type_as(p.b) * p.b).to(x.device)


@step(**{name.replace(".", "__"): 0 for name in DROPOUTS})
def dropouts(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(F.alpha_dropout(x * p.v, 0.1, training=False), 0.5, training=False)


@step(aten__chunk=0, aten__split=0)
def chunks_and_splits(p: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    a, b, c = torch.split(x, [1, 3, 4], dim=2)
    d, e = x.split(5, -1)
    return torch.cat((second, first), -1) + torch.cat((c, a, b), -1) * torch.cat((e, d), -1) * p.b


@step(aten__chunk=0, aten__linear=1)
def gated_in_one(p: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, p.wide).chunk(2, -1)
    return F.silu(gate) * up


@step(graphopt__rms_norm=1, aten__rsqrt=0)
def rms_written_out(p: Any, x: torch.Tensor) -> torch.Tensor:
    return p.v * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@step(graphopt__rms_norm=1)
def rms_divided(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=2, keepdim=True) + 1e-5) * (1 + p.v)


@step(graphopt__rms_norm=1)
def rms_by_power(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean([-1], True) + 1e-5) ** -0.5


@step(graphopt__rms_norm=1)
def rms_called(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (SIZE,), p.v)


@step(aten__layer_norm=1, aten__mean=0)
def layer_norm_written_out(p: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return p.b + p.v * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))


@step(aten__layer_norm=1, aten__var=0)
def layer_norm_by_variance(p: Any, x: torch.Tensor) -> torch.Tensor:
    spread = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) / spread * p.v.reshape(1, 1, SIZE) + p.b


@step(aten__layer_norm=1)
def layer_norm_decomposed(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.native_layer_norm(x, (SIZE,), p.v, p.b, 1e-5)[0]


def _angles(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(x.shape[1], dtype=D)[:, None] * torch.arange(1, count + 1, dtype=D) / 7


@step(graphopt__rotary=1)
def rotary_in_halves(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = torch.cat((_angles(x, 4),) * 2, -1)
    first, second = x[..., :4], x[..., 4:]
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


@step(graphopt__rotary=1)
def rotary_of_half_tables(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    cos, sin = _angles(x, 4).cos(), _angles(x, 4).sin()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + cos * second), -1)


@step(graphopt__rotary=1)
def rotary_in_pairs(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = _angles(x, 4).repeat_interleave(2, -1)
    return x * angles.cos() + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * angles.sin()


@step(graphopt__rotary=1)
def rotary_of_pair_tables(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    cos, sin, even, odd = _angles(x, 4).cos(), _angles(x, 4).sin(), x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


@step(graphopt__rotary=0)
def rotary_turned_the_other_way(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = torch.cat((_angles(x, 4),) * 2, -1)
    return x * angles.cos() + torch.cat((x[..., 4:], -x[..., :4]), -1) * angles.sin()


@step(aten__index=0)
def constant_places(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    return torch.cat((x[..., p.even], x[..., p.odd]), -1)


@step(graphopt__routed_ffn=1, aten__linear=1)
def mixture(p: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, SIZE)
    weights, chosen = torch.topk(torch.softmax(flat @ p.router.T, -1), 2, -1)
    ids, rows = chosen.reshape(-1), flat.repeat_interleave(2, dim=0)
    hidden = torch.bmm(p.experts_up[ids], rows.unsqueeze(-1)).squeeze(-1)
    gate, up = hidden.chunk(2, -1)
    out = torch.bmm(p.experts_down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    out = (out * weights.reshape(-1, 1)).view(-1, 2, SIZE).sum(1)
    return out.view(x.shape)


def every_expert(p: Any, flat: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts on every token times its score, stored input first."""
    rows = flat.repeat(3, 1) * scores.T.reshape(-1, 1)
    gate, up = torch.bmm(rows.view(3, -1, SIZE), p.experts_up.mT.contiguous()).chunk(2, -1)
    out = torch.bmm(up * F.silu(gate), p.experts_down.mT.contiguous())
    return out.reshape(-1, SIZE).view(3, -1, SIZE).sum(0)


@step(graphopt__routed_ffn=1, aten__linear=1)
def mixture_of_scored_inputs(p: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, SIZE)
    logits = flat @ p.router.T
    best, chosen = torch.topk(logits, 2, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best).sigmoid()
    return every_expert(p, flat, scores).view(x.shape)


@step(aten__mul=1)
def neutral_arithmetic(p: Any, x: torch.Tensor) -> torch.Tensor:
    return ((x + 0) * 1 - 0) / 1 * p.b


def lower_and_compare(model: nn.Module) -> Program:
    """Capture, and compare with the module in float64 at two sizes and at one of 1."""
    program = capture_module(model, draw(2, 5), compare=False)
    for shape in ((2, 5), (3, 7), (1, 1)):
        error = compare_outputs(program, model, {"x": draw(*shape, seed=sum(shape))})
        assert error < 1e-12, f"at {shape}: {error}"
    verify(program)
    assert not any(is_mutable(node.target) for node in program.graph.nodes)
    return program


@pytest.mark.parametrize("name", STEPS)
def test_each_spelling_becomes_the_operators_of_the_dialect(name: str) -> None:
    """Wrong if a pass written for the dialect missed models that spell the operator this way."""
    program = lower_and_compare(Chain([name]))
    for operator, count in STEPS[name][1].items():
        assert program.operators[operator] == count, program.text()


@settings(max_examples=examples(36), deadline=None)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_random_chains_of_spellings_keep_their_values(names: list[str], seed: int) -> None:
    """Wrong if two rules that are each right spoiled one another's graph."""
    program = lower_and_compare(Chain(names, seed))
    wanted: Counter[str] = Counter()
    for name in names:
        wanted.update(STEPS[name][1])
    for operator in (
        "aten.linear",
        "aten.layer_norm",
        "graphopt.rms_norm",
        "graphopt.rotary",
        "graphopt.routed_ffn",
    ):
        assert program.operators[operator] == wanted[operator], (operator, names)
    before, count = program.text(), len(program.nodes)
    canonicalise(program)
    assert (program.text(), len(program.nodes)) == (before, count), "canonicalising twice changed the graph"


LOOKALIKES: dict[str, tuple[Step, str]] = {
    "mean over positions": (
        lambda p, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), "graphopt.rms_norm",
    ),
    "another value's mean": (
        lambda p, x: (x @ p.w) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), "graphopt.rms_norm",
    ),
    "fourth power": (
        lambda p, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5), "graphopt.rms_norm",
    ),
    "variance of a sample": (
        lambda p, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), "aten.layer_norm",
    ),
    "both last dimensions": (
        lambda p, x: (x - x.mean((1, 2), True))
        / torch.sqrt((x - x.mean((1, 2), True)).pow(2).mean((1, 2), True) + 1e-5), "aten.layer_norm",
    ),
    "unequal halves": (
        lambda p, x: x * p.v + torch.cat((-x[..., 3:], x[..., :3]), -1) * p.b, "graphopt.rotary",
    ),
    "one angle for all pairs": (
        lambda p, x: torch.cat((x[..., :4] * p.b[0].cos() - x[..., 4:] * p.b[0].sin(),
                                x[..., 4:] * p.b[0].cos() + x[..., :4] * p.b[0].sin()), -1), "graphopt.rotary",
    ),
    "half of the bias": (
        lambda p, x: torch.addmm(p.b, x.reshape(-1, SIZE), p.w, beta=0.5).view(x.shape), "aten.linear",
    ),
    "product from the left": (lambda p, x: (p.w @ x.mT).mT, "aten.linear"),
    "experts that were not chosen as well": (
        lambda p, x: every_expert(
            p, x.reshape(-1, SIZE),
            (x.reshape(-1, SIZE) @ p.router.T).scatter(
                1, (x.reshape(-1, SIZE) @ p.router.T).topk(2, dim=1).indices, 3.0).sigmoid(),
        ).view(x.shape), "graphopt.routed_ffn",
    ),
    "two products at once": (lambda p, x: torch.einsum("bsi,bti->bst", x, x) @ x, "aten.linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_an_operator_is_left_alone(name: str) -> None:
    """Wrong if a near miss were raised to an operator that computes something else."""
    function, operator = LOOKALIKES[name]
    program = lower_and_compare(Function(function))
    assert program.operators[operator] == 0


def test_a_value_read_besides_its_norm_keeps_the_parts_that_are_read() -> None:
    """Wrong if raising a norm lost a mean square, or a normalised value, that something else reads."""

    def both(p: Any, x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * torch.rsqrt(square + 1e-5) * p.v + square + normal

    program = lower_and_compare(Function(both))
    assert program.operators["aten.mean"] >= 1


def test_equal_computations_are_one() -> None:
    """Wrong if tables that every layer computes anew stayed as many copies."""

    def tables(p: Any, x: torch.Tensor) -> torch.Tensor:
        return x * _angles(x, SIZE).cos() + torch.tanh(x * _angles(x, SIZE).cos()) * _angles(x, SIZE).sin()

    program = lower_and_compare(Function(tables))
    assert program.operators["aten.cos"] == program.operators["aten.arange"] - 1 == 1


def test_a_number_and_a_truth_value_stay_apart() -> None:
    """Wrong if sharing equal calls took 1, 1.0 and True for one argument."""

    def types(p: Any, x: torch.Tensor) -> torch.Tensor:
        full = [
            torch.full_like(x, value, dtype=dtype) for value, dtype in ((1, D), (1.0, D), (True, torch.bool))
        ]
        return x * full[0] + full[1] * full[2]

    assert lower_and_compare(Function(types)).operators["aten.full_like"] >= 2


def test_tied_weights_are_one_placeholder_with_all_names() -> None:
    """Wrong if a rewrite of one use could miss the other name of the same tensor."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, SIZE, dtype=D)
            self.head = nn.Linear(SIZE, 11, bias=False, dtype=D)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    program = capture_module(Tied(), torch.randint(0, 11, (2, 5)))
    (weight,) = program.weights.values()
    assert set(weight.all_names) == {"table.weight", "head.weight"}
    assert math.prod(weight.source.shape) == 11 * SIZE
    assert program.weight_node("head.weight") is program.weight_node("table.weight")
