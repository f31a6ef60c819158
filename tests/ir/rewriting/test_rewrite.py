"""The subgraph rewriter: what matches, what is left alone and why, and that values stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import graphopt
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.checking.verify import compare_programs, verify
from graphopt.ir.program import Program
from graphopt.ir.rewriting.match import Matcher, find
from graphopt.ir.rewriting.pattern import Either, Wild, call
from graphopt.ir.rewriting.rewrite import Rewrites
from graphopt.ir.schema import is_operator

D = torch.float64
Model = Callable[..., Any]


class Function(nn.Module):
    """A function of a matrix, a vector and one or two inputs times the matrix."""

    def __init__(self, function: Model):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=D) / 3)
        self.v = nn.Parameter(torch.randn(8, generator=generator, dtype=D))
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(self, F.linear(x, self.w), F.linear(y, self.w))


def draw(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {name: torch.randn(batch, length, 8, generator=generator, dtype=D) for name in "xy"}


def rewritten(
    model: Model, pattern: Any, replacement: Any, where: Any = None
) -> tuple[Rewrites, Program, Program]:
    """Rewrite a copy, verify all of it, and compare both programs at two sizes."""
    before = capture_module(Function(model), draw(), compare=False)
    after = before.copy()
    result = graphopt.rewrite(after, pattern, replacement, where)
    verify(after)
    for shape in ((2, 5), (3, 7)):
        assert max(compare_programs(before, after, draw(*shape)).values()) < 1e-13, after.text()
    return result, before, after


SPELLINGS: dict[str, tuple[Model, Callable[..., Any], Callable[..., Any]]] = {
    "operands swapped": (
        lambda p, x, y: p.v + torch.relu(x), lambda a, b: torch.relu(a) + b, lambda a, b: b + a.clamp(min=0),
    ),
    "operands swapped inside": (
        lambda p, x, y: y * (torch.sigmoid(x) * x), lambda a, b: (a * torch.sigmoid(a)) * b, lambda a, b: F.silu(a) * b,
    ),
    "dimension in a list": (
        lambda p, x, y: x.mean([-1], keepdim=True) * y,
        lambda a: a.mean(-1, keepdim=True), lambda a: a.sum(-1, True) / 8,
    ),
    "dimension by itself": (
        lambda p, x, y: x.mean(-1, True) * y,
        lambda a: torch.mean(a, dim=[-1], keepdim=True), lambda a: a.sum([-1], True) / 8,
    ),
    "keyword given, positional sought": (
        lambda p, x, y: torch.softmax(input=x, dim=-1), lambda a: F.softmax(a, -1), lambda a: F.softmax(a, dim=-1) * 1.0,
    ),
    "default written out": (
        lambda p, x, y: torch.add(x, y, alpha=1), lambda a, b: a + b, lambda a, b: b + a,
    ),
    "default left out": (
        lambda p, x, y: F.gelu(x), lambda a: F.gelu(a, approximate="none"), lambda a: F.gelu(a) * 1.0,
    ),
    "module function for an operator": (
        lambda p, x, y: F.layer_norm(x, (8,), p.v, p.v), lambda a, w, b: F.layer_norm(a, (8,), w, b),
        lambda a, w, b: F.layer_norm(a, (8,)) * w + b,
    ),
    "number from the left": (
        lambda p, x, y: 1 - torch.sigmoid(x), lambda a: 1 - torch.sigmoid(a), lambda a: torch.sigmoid(-a),
    ),
    "number divided": (
        lambda p, x, y: 3 / (1 + torch.exp(-x)), lambda a: 3 / (1 + torch.exp(-a)), lambda a: a.sigmoid() * 3,
    ),
    "whole number for a float": (lambda p, x, y: x**2.0, lambda a: a**2, lambda a: a * a),
    "transposition as a permutation": (
        lambda p, x, y: x.transpose(1, 2) * 2, lambda a: a.mT * 2, lambda a: (a + a).swapaxes(-1, -2),
    ),
    "chunks as a split": (
        lambda p, x, y: x.chunk(2, -1)[0] * x[..., 4:],
        lambda a: torch.chunk(a, 2, -1)[0], lambda a: torch.split(a, [4, 4], -1)[0],
    ),
    "contiguous": (
        lambda p, x, y: torch.relu(x.mT.contiguous()), lambda a: torch.relu(a.contiguous()), lambda a: F.relu(a) * 1.0,
    ),
    "an operator of graphopt's set": (
        lambda p, x, y: F.rms_norm(x, (8,), p.v, 1e-5), lambda a, w, e: torch.ops.graphopt.rms_norm(a, w, e),
        lambda a, w, e: torch.ops.graphopt.rms_norm(a, None, e) * w,
    ),
    "the same value twice": (
        lambda p, x, y: torch.relu(x) + torch.relu(x), lambda a: F.relu(a) + F.relu(a), lambda a: torch.relu(a) * 2,
    ),
    "a slice in the replacement": (
        lambda p, x, y: torch.tanh(x), lambda a: torch.tanh(a),
        lambda a: torch.cat([torch.tanh(a[..., :3]), torch.tanh(a[..., 3:])], -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_pattern_matches_every_spelling(name: str) -> None:
    """Wrong if users had to know how torch.export happens to write a call."""
    result, _, _ = rewritten(*SPELLINGS[name])
    assert len(result) == 1, result.refused


DIFFERENT: dict[str, tuple[Model, Callable[..., Any], str]] = {
    "another default": (lambda p, x, y: F.gelu(x, approximate="tanh"), lambda a: F.gelu(a), "approximate=tanh"),
    "another epsilon": (
        lambda p, x, y: F.layer_norm(x, (8,), p.v, p.v, 1e-3), lambda a, w, b: F.layer_norm(a, (8,), w, b), "1e-05 was expected",
    ),
    "another rounding": (lambda p, x, y: torch.div(x, 2.0, rounding_mode="floor"), lambda a, b: a / b, "rounding_mode"),
    "a factor on the wrong side": (
        lambda p, x, y: torch.add(x, torch.relu(x), alpha=2),
        lambda a, b: torch.add(torch.relu(a), b, alpha=2), "aten.relu was expected",
    ),
    "subtraction does not commute": (
        lambda p, x, y: y - torch.relu(x), lambda a, b: torch.relu(a) - b, "aten.relu was expected",
    ),
    "two values for one name": (lambda p, x, y: x * 3.0 + 2.0, lambda a, c: a * c + c, "c would be"),
    "another number": (lambda p, x, y: x * 3.0, lambda a: a * 2.0, "2.0 was expected"),
    "another permutation": (lambda p, x, y: x.transpose(0, 2) * 2, lambda a: a.mT * 2, "the permutation"),
    "other parts": (lambda p, x, y: x.split([3, 5], -1)[0], lambda a: a.split(4, -1)[0], "parts of sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_left_alone_and_says_why(name: str) -> None:
    """Wrong if an argument that changes the result were overlooked, or the miss had no reason."""
    model, pattern, reason = DIFFERENT[name]
    result, before, after = rewritten(model, pattern, lambda *values: values[0] * 0)
    assert len(result) == 0
    assert any(reason in why for _, why in result.refused), result.refused
    assert after.text() == before.text()


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8])
def test_chains_of_matches_share_no_node(length: int) -> None:
    """Wrong if the second of two adjacent matches saw nodes that the first had replaced."""

    def chain(p: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(length):
            x = torch.neg(x)
        return x * 2

    result, _, after = rewritten(chain, lambda a: torch.neg(torch.neg(a)), lambda a: a)
    assert len(result) == length // 2
    assert after.operators["aten.neg"] == length % 2


def test_a_replacement_may_be_an_input_or_feed_the_next_match() -> None:
    """Wrong if a later match captured a value that an earlier one removed."""

    def steps(p: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = (x + y) * 2.0
        return x

    result, _, after = rewritten(steps, lambda a, b, c: (a + b) * c, lambda a, b, c: a * c + b * c)
    assert len(result) == 3
    assert after.operators == {"aten.linear": 2, "aten.mul": 6, "aten.add": 3}


def test_values_read_elsewhere_are_not_rewritten_away() -> None:
    """Wrong if a value inside a match vanished under another reader, or was computed twice."""
    shared = lambda p, x, y: (torch.relu(x) * 2, torch.relu(x) + 1)  # noqa: E731
    result, before, after = rewritten(shared, lambda a: torch.relu(a) * 2, lambda a: torch.relu(a * 2))
    assert result.refused == [("mul", "relu is read outside the match")]
    assert after.text() == before.text()
    returned = lambda p, x, y: (torch.relu(x) * 2, torch.relu(x))  # noqa: E731
    assert len(rewritten(returned, lambda a: torch.relu(a) * 2, lambda a: torch.relu(a * 2))[0]) == 0


def test_results_of_one_pattern_are_replaced_together() -> None:
    """Wrong if a pattern with two results needed both in a certain order, or lost one."""
    swap: Any = (
        lambda a: (torch.sin(a), torch.cos(a)),
        lambda a: (torch.sin(a) * 1.0, torch.sin(a + torch.pi / 2)),
    )
    assert len(rewritten(lambda p, x, y: (torch.sin(x), torch.cos(x)), *swap)[0]) == 2
    # the first result is read before the second is computed
    early = rewritten(lambda p, x, y: torch.cos(x) * torch.tanh(torch.sin(x)), *swap)
    assert len(early[0]) == 2
    late = rewritten(lambda p, x, y: torch.tanh(torch.cos(x)) * torch.sin(x), *swap)
    assert len(late[0]) == 2
    assert len(rewritten(lambda p, x, y: torch.sin(x) + torch.cos(y), *swap)[0]) == 0


def test_linears_of_one_input_become_one() -> None:
    """Wrong if the pattern every fusion starts with did not work as a user would write it."""
    result, _, after = rewritten(
        lambda p, x, y: F.silu(F.linear(x, p.w * 2)) * F.linear(x, p.w.T * p.v),
        lambda a, u, v: (F.linear(a, u), F.linear(a, v)),
        lambda a, u, v: F.linear(a, torch.cat([u, v])).chunk(2, -1),
    )
    assert len(result) == 2
    assert after.operators["aten.linear"] == 2
    assert after.operators["aten.split_with_sizes"] == 1


def test_where_decides_and_its_reason_is_kept() -> None:
    """Wrong if a condition were ignored, or its answer lost."""
    both = lambda p, x, y: (torch.relu(x), torch.relu(x * 2))  # noqa: E731
    result, _, after = rewritten(
        both, lambda a: torch.relu(a), lambda a: a.clamp(min=0),
        where=lambda m: "not after a product" if is_operator(m["a"], "aten.mul") else True,
    )  # fmt: skip
    assert (len(result), result.refused) == (1, [("relu_1", "not after a product")])
    assert after.operators["aten.relu"] == 1
    refused = rewritten(both, lambda a: torch.relu(a), lambda a: a, where=lambda m: False)[0]
    assert {why for _, why in refused.refused} == {"where() said no"}


def test_wildcards_take_plain_values_and_nodes_take_shapes() -> None:
    """Wrong if numbers in a pattern had to be fixed, or new nodes had no recorded value."""
    result, _, after = rewritten(
        lambda p, x, y: x * 3.0 + 1.5, lambda a, c, d: a * c + d, lambda a, c, d: (a + d / c) * c
    )
    assert len(result) == 1
    made = result.values[0]
    assert str(after.size_text(made.meta["val"].shape[0])) == "batch"
    assert made.meta["val"].dtype is D
    shaped = rewritten(
        lambda p, x, y: x.reshape(-1, 4) * 2.0, lambda a, sizes: a.reshape(sizes),
        lambda a, sizes: (a * 1.0).reshape(sizes),
    )  # fmt: skip
    assert len(shaped[0]) == 1


@pytest.mark.parametrize(
    "replacement",
    [lambda a: a.sum(-1), lambda a: a.to(torch.float32), lambda a: a[..., :4], lambda a: F.linear(a, a)],
)
def test_a_replacement_of_another_shape_is_refused_and_leaves_nothing(replacement: Any) -> None:
    """Wrong if readers were given a value of another size or type, or debris stayed in the graph."""
    program = capture_module(Function(lambda p, x, y: torch.relu(x) * y), draw(), compare=False)
    before = program.text()
    with pytest.raises(graphopt.VerificationError):
        graphopt.rewrite(program, lambda a: torch.relu(a), replacement)
    assert program.text() == before
    verify(program)


def test_patterns_that_mean_nothing_are_refused() -> None:
    """Wrong if a mistake in a pattern surfaced as an error deep inside."""
    program = capture_module(Function(lambda p, x, y: torch.relu(x)), draw(), compare=False)
    relu: Any = lambda a: torch.relu(a)  # noqa: E731
    with pytest.raises(graphopt.UsageError, match="must compute something"):
        graphopt.rewrite(program, lambda a: a, relu)
    with pytest.raises(graphopt.UsageError, match="returns 2 values, the pattern 1"):
        graphopt.rewrite(program, relu, lambda a: (a, a))
    with pytest.raises(graphopt.UsageError, match="does not capture"):
        graphopt.rewrite(program, call("relu")(Wild("a")), lambda b: b)
    with pytest.raises(graphopt.UsageError, match="no ATen operator"):
        graphopt.rewrite(program, lambda a: a.rectified(), relu)
    verify(program)


def test_patterns_made_by_hand() -> None:
    """Wrong if alternatives, optional nodes or conditions on nodes did not work outside the package."""
    program = capture_module(
        Function(lambda p, x, y: torch.tanh(torch.relu(x) * 2) + torch.tanh(torch.sigmoid(y))),
        draw(),
        compare=False,
    )
    inner = Either((call("relu")(Wild("a")), call("sigmoid")(Wild("a"))))
    pattern = call("tanh")(Either((call("mul")(inner, 2), inner)))
    found = list(find(program.graph, pattern))
    assert [m.roots[0].name for m in found] == ["tanh", "tanh_1"]
    picky = call("relu", where=lambda n: "never")(Wild("a"))
    result = graphopt.rewrite(program, picky, lambda a: a)
    assert result.refused == [("relu", "never")]


RULES: list[tuple[Any, Any]] = [
    (lambda a, b, c: a * b + a * c, lambda a, b, c: a * (b + c)),
    (lambda a: torch.relu(a), lambda a: a.clamp(min=0)),
    (lambda a, b: a - b, lambda a, b: a + (-b)),
    (lambda a: -(-a), lambda a: a),
    (lambda a: a * torch.sigmoid(a), lambda a: F.silu(a)),
    (lambda a: a + a, lambda a: 2.0 * a),
    (lambda a: (torch.sin(a), torch.cos(a)), lambda a: (torch.sin(a) * 1.0, torch.cos(a) * 1.0)),
    (lambda a, b: torch.tanh(a) * torch.tanh(b), lambda a, b: torch.tanh(b) * torch.tanh(a)),
]
STEPS: list[Callable[..., torch.Tensor]] = [
    lambda a, b: a * b, lambda a, b: a + b, lambda a, b: a - b, lambda a, b: torch.relu(a),
    lambda a, b: -a, lambda a, b: a * torch.sigmoid(a), lambda a, b: torch.sin(a), lambda a, b: torch.cos(a),
    lambda a, b: torch.tanh(a), lambda a, b: a * b + a * torch.tanh(b), lambda a, b: -(-b),
]  # fmt: skip


@settings(max_examples=examples(45), deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=12),
    rules=st.lists(st.sampled_from(range(len(RULES))), min_size=1, max_size=4),
)  # fmt: skip
def test_random_graphs_keep_their_values(steps: Any, rules: list[int]) -> None:
    """Wrong if matches that touch, overlap or share values were rewritten into something else."""

    def model(p: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        values = [x, y]
        for which, first, second in steps:
            values.append(STEPS[which](values[first % len(values)], values[second % len(values)]))
        return values[-1], values[len(values) // 2]

    before = capture_module(Function(model), draw(), compare=False)
    after = before.copy()
    for rule in rules:
        graphopt.rewrite(after, *RULES[rule])
        verify(after)
    assert max(compare_programs(before, after, draw(3, 4)).values()) < 1e-11


def _work(program: Program, pattern: Any) -> int:
    """Count the values that the matcher looks at."""
    count = 0
    original = Matcher._value

    def counted(self: Matcher, pattern: Any, value: Any, state: Any) -> Any:
        nonlocal count
        count += 1
        return original(self, pattern, value, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "_value", counted)
        found = graphopt.rewrite(program.copy(), pattern, lambda a, b: (torch.relu(a) * b, torch.tanh(a) * b))
    assert len(found) > 0
    return count


def test_work_is_linear_in_the_graph() -> None:
    """Wrong if a table that every layer reads made each match look at every layer."""

    def layers(count: int) -> Model:
        def model(p: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for _ in range(count):
                x = torch.relu(x) * y + torch.tanh(x) * y
            return x

        return model

    def pattern(a: Any, b: Any) -> Any:
        return torch.relu(a) * b, torch.tanh(a) * b

    works = [_work(capture_module(Function(layers(n)), draw(), compare=False), pattern) for n in (10, 20, 40)]
    assert works[1] < 2.1 * works[0], works
    assert works[2] < 2.1 * works[1], works


def test_the_graph_may_be_edited_while_it_is_searched() -> None:
    """Wrong if a match were offered on nodes that the caller has already taken out."""
    program = capture_module(
        Function(lambda p, x, y: torch.neg(torch.neg(torch.neg(x))) + torch.neg(y)), draw(), compare=False
    )
    seen: list[fx.Node] = []
    for match in find(program.graph, call("neg")(call("neg")(Wild("a")))):
        seen.append(match.roots[0])
        program.edit.replace(match.roots[0], match["a"])
    assert len(seen) == 1
    verify(program)
