"""Canonicalisation: whatever a model's spelling, the same operators that compute the same values."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_networks import SIZE, STEPS, Chain, D, Function, Step, angle_table, draw, every_expert
from torch import nn

from graphopt.frontends.compare import compare_outputs
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.canonical import canonicalise
from graphopt.ir.checking.verify import verify
from graphopt.ir.program import Program
from graphopt.ir.schema import is_mutable


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
    """Wrong if a pass written for graphopt's set missed models that spell the operator this way."""
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
        return (
            x * angle_table(x, SIZE).cos()
            + torch.tanh(x * angle_table(x, SIZE).cos()) * angle_table(x, SIZE).sin()
        )

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
