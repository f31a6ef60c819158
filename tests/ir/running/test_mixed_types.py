"""Norms, convolutions and linears of different types beside one another: folded to the type each had."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_networks import CONVOLUTIONS, NORMS
from torch import nn

import graphopt
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes import Exact, Pass, Plan, Site
from graphopt.passes.framework.manager import run_pipeline

B, H, S, D = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDING = {B: 2e-2, H: 3e-3, S: 1e-5}


def norm(axes: int, channels: int) -> nn.Module:
    """A BatchNorm of type float32 with statistics of a network that was trained."""
    made = NORMS[axes](channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    return made


def holds(program: Program, made: Program, x: torch.Tensor) -> None:
    """Nothing was rolled back, types stayed, values are right in float64 and in the types that are stored."""
    entry = made.report.passes[-1]
    assert not [r for r in entry.refused if r.rolled_back]
    assert entry.error is None or entry.error < 1e-11
    (name,) = program.signature.inputs
    for given_x in (x, torch.cat([x, x * 0.5])):
        expected, found = program(given_x), made(given_x)
        assert found.dtype == expected.dtype
        scale = float(expected.double().abs().max())
        assert float((found.double() - expected.double()).abs().max()) <= ROUNDING[x.dtype] * scale
        # matrices were rounded once, so in float64 both agree to that
        (error,) = compare_programs(program, made, {name: given_x}).values()
        assert error < ROUNDING[x.dtype]


@settings(max_examples=examples(18), deadline=None)
@given(
    axes=st.integers(1, 2),
    types=st.lists(st.sampled_from(["same", "float32"]), min_size=2, max_size=4),
    dtype=st.sampled_from([B, H]),
    padding=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2]),
    first=st.booleans(),
    step=st.sampled_from(["fold-norms", "fuse-branches"]),
)
def test_chains_of_convolutions_and_norms(
    axes: int, types: list[str], dtype: torch.dtype, padding: list[int], groups: int, first: bool, step: str
) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [norm(axes, 4)] if first else []
    for number, kind in enumerate(types):
        layers.append(CONVOLUTIONS[axes](4, 4, 3, padding=padding[number], groups=groups).to(dtype))
        made = norm(axes, 4)
        layers += [made.to(dtype) if kind == "same" else made, nn.ReLU()]
    x = torch.randn(2, 4, *[9] * axes).to(dtype)
    program = graphopt.capture(nn.Sequential(*layers).eval(), x)
    made = graphopt.optimize(program, step)
    holds(program, made, x)
    left = made.operators.get("aten.batch_norm", 0)
    assert left == (1 if first and padding[0] else 0), "a norm behind its convolution is always taken"
    assert all(w.dtype is dtype for n, w in kernels(made) if n)


def kernels(program: Program) -> list[tuple[bool, torch.Tensor]]:
    convolutions = [n for n in program.graph.nodes if "conv" in n.name and n.op == "call_function"]
    values = [(True, a.meta["val"]) for n in convolutions for a in n.args[1:3] if hasattr(a, "meta")]
    return [v for v in values if isinstance(v[1], torch.Tensor)]


def test_a_linear_keeps_its_type() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, dtype=B), norm(1, 6), nn.Linear(6, 3, dtype=B)).eval()
    x = torch.randn(5, 4, dtype=B)
    program = graphopt.capture(model, x)
    made = graphopt.optimize(program, "fold-norms")
    assert "aten.batch_norm" not in made.operators
    holds(program, made, x)


class Normed(nn.Module):
    """A norm in float32, what it gives in another type, and a linear that reads it."""

    def __init__(self, kind: str, inner: torch.dtype, outer: torch.dtype):
        super().__init__()
        self.kind, self.outer = kind, outer
        self.weight = nn.Parameter(torch.rand(8, dtype=inner) + 0.5)
        self.bias = nn.Parameter(torch.randn(8, dtype=inner))
        self.linear = nn.Linear(8, 4, dtype=outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        if self.kind == "layer":
            y = nn.functional.layer_norm(x, (8,), self.weight, self.bias)
        else:
            y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.linear(y.to(self.outer))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("inner", "outer"), [(S, B), (S, H), (B, B), (B, S)])
def test_norms_in_another_type_than_the_matrices_that_read_them(
    kind: str, inner: torch.dtype, outer: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=B)
    program = graphopt.capture(Normed(kind, inner, outer).eval(), x)
    made = graphopt.optimize(program, "fold-norms")
    holds(program, made, x)
    assert len(made.report.passes[-1].sites) == 1


class Scaled(nn.Module):
    """A convolution whose value is scaled by a vector of a wider type, which widens it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, dtype=B)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.norm = norm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x) * self.scale)


def test_what_widens_a_value_is_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=B)
    program = graphopt.capture(Scaled().eval(), x)
    made = graphopt.optimize(program, "fuse-branches{allow_no_match=true}")
    holds(program, made, x)
    assert any("returns float32 for an input of bfloat16" in r.reason for r in made.report.passes[-1].refused)


def test_weights_are_not_narrowed_behind_the_back_of_float64() -> None:
    """A float32 matrix that is rounded to bfloat16 agrees in float64 all the same."""

    @dataclass(frozen=True, kw_only=True)
    class Narrow(Pass):
        """Round a matrix."""

        name = "narrow"
        contract = Exact()

        def plan(self, program: Program, context: Context) -> Plan:
            return Plan([Site("linear")])

        def rewrite(self, program: Program, plan: Plan) -> None:
            node = next(n for n in program.graph.nodes if "linear" in n.name and n.op == "call_function")
            with program.edit.before(node):
                narrow = program.edit.call(torch.ops.aten.to.dtype, node.args[1], B)
                again = program.edit.call(torch.ops.aten.to.dtype, narrow, S)
                new = program.edit.call(node.target, node.args[0], again, *node.args[2:])
            program.edit.replace(node, new)

    program = graphopt.capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(graphopt.ContractError, match="rounds to torch.bfloat16"):
        run_pipeline(program, [Narrow()], Context())
