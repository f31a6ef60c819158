"""stream-convolutions over one of several axes: what happens along the others stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from branch_networks import randomised
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import PassRefusedError, UsageError
from graphopt.ir.checking.streaming import initial_state, stream

D = torch.float64


class Layer(nn.Module):
    """Causal along the third axis; padded along the fourth in one of the ways that models use."""

    def __init__(self, kernel: tuple[int, int], way: str, pool: bool = False):
        super().__init__()
        self.past, self.width, self.way = kernel[0] - 1, kernel[1] - 1, way
        padding: Any = (0, self.width // 2) if way == "own" else 0
        self.conv = nn.Conv2d(4, 4, kernel, padding=padding)
        self.pool = nn.AvgPool2d(kernel, 1) if pool and padding == 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near, far = self.width // 2, self.width - self.width // 2
        if self.way == "one pad":
            x = F.pad(x, (near, far, self.past, 0))
        elif self.way in ("reflect", "replicate", "circular"):
            x = F.pad(F.pad(x, (0, 0, self.past, 0)), (near, far, 0, 0), mode=self.way)
        elif self.way == "pad behind":
            x = F.pad(F.pad(x, (near, far, 0, 0), mode="reflect"), (0, 0, self.past, 0))
        elif self.way == "ones":
            x = F.pad(F.pad(x, (near, far, 0, 0), value=1.0), (0, 0, self.past, 0))
        else:
            x = F.pad(x, (0, 0, self.past, 0))
        y = self.conv(x)
        return torch.relu(y if self.pool is None else y + self.pool(x))


WAYS = ["one pad", "own", "reflect", "replicate", "circular", "pad behind", "ones"]


@pytest.mark.parametrize(("number", "way"), list(enumerate(WAYS)))
def test_other_axes_keep_their_padding(number: int, way: str) -> None:
    torch.manual_seed(0)
    free, layers = number % 3 == 0, [Layer((1 + number % 4, 3), way, number % 2 == 0), Layer((2, 5), "own")]
    network = randomised(nn.Sequential(*layers, nn.Conv2d(4, 3, 1))).double()
    sizes: Any = {"input": {0: "batch", 2: "time"} | ({3: "bins"} if free else {})}
    program = graphopt.capture(network, torch.randn(2, 4, 20, 9, dtype=D), dynamic=sizes, compare=False)
    streaming = graphopt.optimize(program, "stream-convolutions{axis=size}")
    assert len(initial_state(streaming, sizes={"size_2": 9})) == sum(layer.past > 0 for layer in layers)
    for width in (9, 12) if free else (9,):
        x = torch.randn(3, 4, 8, width, dtype=D, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = network(x)
        found = torch.cat(list(stream(streaming, x.split([1, 4, 3], 2))), 2)
        assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_states_with_sizes_that_vary_ask_for_them() -> None:
    network = nn.Sequential(Layer((3, 3), "one pad")).eval()
    sizes: Any = {"input": {0: "batch", 2: "time", 3: "bins"}}
    program = graphopt.capture(network, torch.randn(2, 4, 20, 9), dynamic=sizes)
    streaming = graphopt.optimize(program, "stream-convolutions{axis=size}")
    assert {n: tuple(t.shape) for n, t in initial_state(streaming, 5, sizes={"size_2": 7}).items()} == {
        "state_0": (5, 4, 2, 7)
    }
    with pytest.raises(UsageError, match="state_0 has the size size_2, which varies"):
        initial_state(streaming, 5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_past_of_anything_but_zeros_is_refused(mode: str) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(F.pad(x, (1, 1, 2, 0), mode=mode))

    program = graphopt.capture(Padded().eval(), torch.randn(2, 4, 20, 9))
    with pytest.raises(PassRefusedError, match=f"its past is padded by {mode}, not by zeros"):
        graphopt.optimize(program, "stream-convolutions{axis=size}")
