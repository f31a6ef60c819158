"""BatchNorm into transposed convolutions, and into matrices from which a reshape or permutation parts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from norm_networks import NORMS, draw, fold, randomise
from torch import nn

import graphopt
from graphopt import PassRefusedError

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def norms_left(program: graphopt.Program) -> int:
    return program.operators.get("aten.batch_norm", 0)


@settings(max_examples=examples(24), deadline=None)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    extra=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
)
def test_a_norm_goes_into_the_transposed_convolution_before_it(
    axes: int, kernel: int, stride: int, dilation: int, padding: int, extra: int, groups: int, bias: bool,
    affine: bool,
) -> None:  # fmt: skip
    assume(extra < max(stride, dilation) and padding <= dilation * (kernel - 1))
    options: Any = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": extra}
    matrix = TRANSPOSED[axes](4, 6, kernel, groups=groups, bias=bias, **options)
    model = randomise(
        nn.Sequential(matrix, nn.ReLU(), matrix_again(axes), NORMS[axes](6, affine=affine)), 1, 0.1
    )
    _, folded = fold(model, draw(2, 4, *[4] * axes))
    assert norms_left(folded) == 0
    model = randomise(nn.Sequential(matrix, NORMS[axes](6, affine=affine)), 1, 0.1)
    _, folded = fold(model, draw(2, 4, *[4] * axes))
    assert norms_left(folded) == 0
    assert folded.report.passes[-1].refused == []


def matrix_again(axes: int) -> nn.Module:
    return TRANSPOSED[axes](6, 6, 2, stride=2, groups=3)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_goes_into_a_transposed_convolution_of_one_tap_after_it(groups: int) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=groups))
    _, folded = fold(randomise(model, 2, 0.1), draw(2, 4, 5, 5))
    assert norms_left(folded) == 0


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 1, "stride": 2}])
def test_what_a_norm_adds_is_not_spread_unevenly(options: dict[str, int]) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, **options)).double()
    with pytest.raises(PassRefusedError, match="spreads its input, and with it the norm's shift, unevenly"):
        graphopt.optimize(randomise(model, 3), "fold-norms", inputs=draw(2, 4, 5))


class Through(nn.Module):
    """A matrix, a move of its value, a norm and a move behind it."""

    def __init__(
        self, matrix: nn.Module, norm: nn.Module, there: Callable[..., Any], back: Callable[..., Any]
    ):
        super().__init__()
        self.matrix, self.norm, self.there, self.back = matrix, norm, there, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.matrix(x)
        return self.back(self.norm(self.there(y)), y)


def flattened(y: torch.Tensor) -> torch.Tensor:
    return y.flatten(0, 1)


def shaped_again(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return z.reshape_as(y)


def turned(y: torch.Tensor, _: Any = None) -> torch.Tensor:
    return y.transpose(1, 2)


def as_it_is(z: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return z


MOVES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "tokens flattened": (lambda: nn.Linear(4, 6), flattened, shaped_again, (2, 5, 4)),
    "tokens of the same number": (lambda: nn.Linear(4, 6), flattened, shaped_again, (2, 6, 4)),
    "channels in front": (lambda: nn.Linear(4, 6), turned, turned, (2, 5, 4)),
    "as many tokens as channels": (lambda: nn.Linear(4, 6), turned, turned, (2, 6, 4)),
    "picture to tokens": (lambda: nn.Conv2d(4, 6, 3), lambda y: y.flatten(2), as_it_is, (2, 4, 5, 5)),
    "another axis": (lambda: nn.Conv1d(4, 6, 3), lambda y: y[:, :, :-2], as_it_is, (2, 4, 9)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MOVES)
def test_moves_that_keep_channels_part_no_norm_from_its_matrix(name: str, bias: bool) -> None:
    make, there, back, shape = MOVES[name]
    torch.manual_seed(0)
    model = Through(make(), nn.BatchNorm1d(6), there, back)
    if not bias:
        model.matrix.bias = None  # type: ignore[assignment]
    _, folded = fold(randomise(model, 4, 0.1), draw(*shape))
    assert norms_left(folded) == 0


class Ahead(nn.Module):
    """A norm, a move, and matrices that read it."""

    def __init__(self, norm: nn.Module, move: Callable[..., Any], *matrices: nn.Module):
        super().__init__()
        self.norm, self.move, self.matrices = norm, move, nn.ModuleList(matrices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.move(self.norm(torch.relu(x)))
        return torch.cat([m(x).flatten(1) for m in self.matrices], 1)


def test_moves_after_a_norm_part_it_from_no_matrix() -> None:
    model = Ahead(nn.BatchNorm1d(4), turned, nn.Linear(4, 3), nn.Linear(4, 5, bias=False))
    _, folded = fold(randomise(model, 5, 0.1), draw(2, 4, 6))
    assert norms_left(folded) == 0
    model = Ahead(nn.BatchNorm2d(4), lambda x: x.flatten(2), nn.Conv1d(4, 6, 3, groups=2))
    _, folded = fold(randomise(model, 6, 0.1), draw(2, 4, 3, 3))
    assert norms_left(folded) == 0


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Through(nn.Linear(4, 6), nn.BatchNorm1d(6), lambda y: y, as_it_is), (2, 6, 4)),  # norm over tokens
        (Through(nn.Linear(4, 6), nn.BatchNorm1d(3), lambda y: y.reshape(-1, 3), as_it_is), (2, 5, 4)),
        (
            Through(
                nn.Linear(4, 6), nn.BatchNorm1d(6), lambda y: y.reshape(-1, 6).reshape(-1, 6, 6), as_it_is
            ),
            (6, 4),
        ),
        (Ahead(nn.BatchNorm1d(4), lambda x: x.flatten(1), nn.Linear(12, 5)), (2, 4, 3)),
        (Ahead(nn.BatchNorm1d(4), lambda x: x, nn.Linear(4, 5)), (2, 4, 4)),
    ],
    ids=[
        "another axis",
        "parts of channels",
        "rows for channels",
        "channels with places",
        "places for channels",
    ],
)
def test_channels_that_only_look_alike_are_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    program, folded = fold(randomise(model, 7, 0.1), draw(*shape), compare=True, allow_no_match=True)
    assert norms_left(folded) == norms_left(program) == 1
    assert not any(r.rolled_back for r in folded.report.passes[-1].refused)
