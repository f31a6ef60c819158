"""Ranges of weights that are learned to be narrow: what the penalties are, what learns, and what comes of it in few bits."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import Shape, Transformer, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.ir.errors import UsageError
from graphopt.training import Settings
from graphopt.training.recipes import RangeRegularization, penalty
from graphopt.training.recipes.r2 import largest, matrices, outside, soft_range

NUMBERS = st.lists(st.floats(-3, 3), min_size=2, max_size=12)


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(NUMBERS, st.floats(-2, 2), st.floats(0.1, 5))
def test_the_largest_and_the_margin(values: list[float], margin: float, factor: float) -> None:
    """Never negative, nothing for weights of zero; the largest grows with the weights; the margin's best is the largest."""
    weight, held = numbers(values), numbers([margin])[0]
    assert largest(weight) >= 0 and outside(weight, held) >= 0
    assert torch.allclose(largest(factor * weight), factor * largest(weight))
    assert outside(weight, held) >= largest(weight) - 1e-12
    assert torch.allclose(outside(weight, largest(weight)), largest(weight))
    nothing = torch.zeros(3, dtype=torch.float64)
    assert largest(nothing) == 0 and outside(nothing, nothing[0]) == 0


@given(NUMBERS, st.floats(0.1, 5), st.floats(-4, 4))
def test_the_soft_range(values: list[float], temperature: float, moved: float) -> None:
    """Within the true range, towards it as the temperature rises, the same wherever the weights lie, and 0 for equal ones."""
    weight, held = numbers(values), numbers([temperature])[0]
    rest = (-held).exp()
    found = soft_range(weight, held) - rest
    true = weight.max() - weight.min()
    assert -1e-9 <= found <= true + 1e-9
    assert torch.allclose(soft_range(weight + moved, held) - rest, found, atol=1e-9)
    sharp = numbers([1e5])[0]
    assert torch.allclose(soft_range(weight, sharp), true, atol=1e-3)
    assert abs(float(soft_range(torch.full((4,), moved, dtype=torch.float64), held) - rest)) < 1e-9


@pytest.mark.parametrize("form", [outside, soft_range])
def test_gradients_are_those_of_small_changes(form) -> None:
    weight = numbers([0.9, -1.4, 0.2, 0.35, -0.1]).requires_grad_()
    assert torch.autograd.gradcheck(form, (weight, numbers([0.7])[0].requires_grad_()))


def test_matrices_are_regularised_and_nothing_else() -> None:
    program = graphopt.capture(Transformer(Shape()), tokens(2, 6))
    names = list(matrices(program))
    assert names
    assert all("norm" not in n and "bias" not in n and "embed" not in n for n in names)
    with pytest.raises(UsageError, match="no matrices"):
        RangeRegularization().recipe(graphopt.capture(nn.Tanh(), torch.randn(2, 3)))
    with pytest.raises(UsageError, match="no penalty"):
        penalty(nn.Linear(2, 2))


@pytest.mark.parametrize("form", ["infinity", "margin", "soft"])
def test_ranges_become_narrow_while_it_is_trained(form: str) -> None:
    """Through the loop of the project; margins and temperatures learn, and are no part of what comes out."""
    program = graphopt.capture(Transformer(Shape()), tokens(2, 6))
    data = [tokens(2, 8, seed=s) for s in range(4)]
    settings_ = Settings(steps=12, learning_rate=3e-3)
    done, _ = graphopt.train(program, f"r2{{form={form} strength=0.05}}", data, settings_)
    plain, _ = graphopt.train(program, "language", data, settings_)
    assert {w.name for w in done.weights.values()} == {w.name for w in program.weights.values()}

    def width(which: graphopt.Program) -> float:
        held = {w.name: w.source.load() for w in which.weights.values()}
        return sum(float(held[n].max() - held[n].min()) for n in matrices(program))

    assert width(done) < width(plain), "the penalty does nothing"
    module = RangeRegularization(form=form).recipe(program).module()
    before = [p.detach().clone() for p in module.range_regularization.parameters()]
    penalty(module).backward()
    assert len(before) == (0 if form == "infinity" else len(list(matrices(program))))
    assert all(p.grad is not None and p.grad.abs() > 0 for p in module.range_regularization.parameters())


def test_a_copy_has_a_penalty_of_its_own() -> None:
    module = (
        RangeRegularization(form="margin")
        .recipe(graphopt.capture(Transformer(Shape()), tokens(2, 6)))
        .module()
    )
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    assert torch.allclose(penalty(other), 3 * penalty(module)), "the copy's penalty is the original's"


def test_a_network_whose_ranges_are_kept_small_bears_few_bits_better() -> None:
    """A classifier with a loop and a loss of its own, trained with and without, stored in four bits to the nearest."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 12, generator=generator)
    labels = torch.randint(0, 6, (512,), generator=generator)
    points = centres[labels] + 0.4 * torch.randn(512, 12, generator=generator)

    def losses(strength: float) -> float:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))
        with torch.no_grad():
            for layer in (net[2], net[4]):
                layer.weight[:, 0] *= 12  # an outlier in each row takes all steps
        program = graphopt.capture(net.eval(), {"input": points[:8]})
        recipe = RangeRegularization(strength=strength).recipe(program)
        module = recipe.module()
        optimizer = torch.optim.Adam(module.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(module(points[:256]), labels[:256]) + penalty(module)).backward()
            optimizer.step()
        trained = recipe.finish(program, module)
        data = [{"input": part} for part in points.split(64)]
        few = graphopt.optimize(
            trained, "fit-target{allow_no_match=true}, quantize{weights=4 rounding=nearest}", data=data
        )
        expected = trained(points[256:])
        return float((few(points[256:]) - expected).norm() / expected.norm())

    assert losses(0.01) < 0.8 * losses(0.0)
