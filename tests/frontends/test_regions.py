"""Regions in a model's forward: gradients on or off, autocast on or off, control flow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir.errors import CaptureError

D = torch.float64
REGIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


class Net(nn.Module):
    def __init__(self, outer: str, inner: str) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        self.first, self.last = nn.Linear(4, 6, dtype=D), nn.Linear(6, 4, dtype=D)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with REGIONS[self.outer]():
            hidden = self.first(x).clone()
            with REGIONS[self.inner]():
                hidden += x.sum(-1, keepdim=True) * x.shape[1]
            parts = hidden.chunk(2, -1)
        return self.last(torch.cat(parts[::-1], -1)), hidden


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("inner", REGIONS)
@pytest.mark.parametrize("outer", REGIONS)
def test_a_region_is_captured_as_the_calls_in_it(outer: str, inner: str, exported: bool) -> None:
    """Wrong if a region were refused, lost a call, or read a value of before it."""
    model = Net(outer, inner).eval()
    x = torch.randn(2, 5, 4, dtype=D)
    if exported:
        auto = {"x": dict.fromkeys(range(2), torch.export.Dim.AUTO)}
        program = graphopt.capture(torch.export.export(model, (x,), dynamic_shapes=auto))
    else:
        program = graphopt.capture(model, x)
    for rows, length in ((2, 5), (3, 7)):
        x = torch.randn(rows, length, 4, dtype=D)
        for found, wanted in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_region_under_autocast_is_refused_with_its_type() -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    model = type("Net", (nn.Module,), {"forward": forward})().eval()
    with pytest.raises(CaptureError, match="under autocast.*bfloat16"):
        graphopt.capture(model, torch.randn(4, 4))


def test_control_flow_is_refused() -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    model = type("Net", (nn.Module,), {"forward": forward})().eval()
    with pytest.raises(CaptureError, match="control flow"):
        graphopt.capture(model, torch.randn(4, 4))
