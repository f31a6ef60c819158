"""Sums and differences of branches over one value, as RepViT and FastViT have them."""

from __future__ import annotations

import pytest
import torch
from branch_networks import conv_bn, randomised
from torch import nn

import graphopt
from graphopt.frontends.compare import compare_outputs

D = torch.float64


class AroundASum(nn.Module):
    """A norm over a convolution, a smaller one and the value itself, which is a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4, 3, padding=1)
        self.wide = conv_bn(4, 4, 3, padding=1, groups=4)
        self.narrow = nn.Conv2d(4, 4, 1, groups=4)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(torch.relu(x))
        return torch.relu(self.norm(self.wide(x) + self.narrow(x) + x))


class Difference(nn.Module):
    """A value, and what a scaled difference of a convolution and a norm over it adds."""

    def __init__(self, turned: bool):
        super().__init__()
        self.mixer, self.norm = conv_bn(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.turned = turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        first, second = self.mixer(x), self.norm(x)
        return torch.relu(x + self.scale * (second - first if self.turned else first - second))


@pytest.mark.parametrize(
    ("network", "channels", "left"),
    [(AroundASum(), 3, 2), (Difference(False), 4, 1), (Difference(True), 4, 1)],
)
def test_no_norm_is_left(network: nn.Module, channels: int, left: int) -> None:
    network = randomised(network).to(D)
    x = torch.randn(2, channels, 7, 6, dtype=D)
    program = graphopt.capture(network, x)
    made = graphopt.optimize(program, "fuse-branches")
    assert "aten.batch_norm" not in made.operators
    assert made.operators["aten.conv2d"] == left
    assert made.report.passes[-1].change["flops"][1] <= made.report.passes[-1].change["flops"][0]
    (name,) = program.signature.inputs
    for given in (x, torch.randn(1, channels, 9, 4, dtype=D)):
        assert compare_outputs(made, network, {name: given}) < 1e-10
