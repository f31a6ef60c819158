"""Small networks in many spellings, for tests of what capture makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

D = torch.float64


SIZE = 8


Step = Callable[[Any, torch.Tensor], torch.Tensor]


STEPS: dict[str, tuple[Step, dict[str, int]]] = {}


class Weights(nn.Module):
    """The tensors that one step may use; a fresh set each, so that no two steps are equal."""

    def __init__(self, generator: torch.Generator):
        super().__init__()

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=D) * SIZE**-0.5)

        self.w, self.u, self.b, self.v = draw(SIZE, SIZE), draw(SIZE, SIZE), draw(SIZE), draw(SIZE)
        self.wide, self.experts_up = draw(2 * SIZE, SIZE), draw(3, 2 * 6, SIZE)
        self.experts_down, self.router = draw(3, SIZE, 6), draw(3, SIZE)
        self.register_buffer("even", torch.arange(0, SIZE, 2))
        self.register_buffer("odd", torch.arange(1, SIZE, 2))


class Chain(nn.Module):
    """Steps in a row, with a residual that keeps values of one size."""

    def __init__(self, names: list[str], seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.names = names
        self.weights = nn.ModuleList(Weights(generator) for _ in names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, weights in zip(self.names, self.weights, strict=True):
            x = STEPS[name][0](weights, torch.tanh(x))
        return x


def draw(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, SIZE, generator=generator, dtype=D)


class Function(nn.Module):
    def __init__(self, function: Step):
        super().__init__()
        self.p = Weights(torch.Generator().manual_seed(3))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.p, x * self.p.v)
