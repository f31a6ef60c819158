"""A model that was captured is the one that it was, whatever it keeps between calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt

WIDTH = 8


class Keeping(nn.Module):
    """A layer that fills in a table when it is first called."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.linear = where, nn.Linear(WIDTH, WIDTH)
        self.table: torch.Tensor | None = None
        self.own = SimpleNamespace(tables={})
        self.nested: dict[str, dict[int, torch.Tensor]] = {"tables": {}}
        if where == "two names":
            self.other = self.linear

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        def made() -> torch.Tensor:
            return torch.arange(WIDTH, dtype=x.dtype, device=x.device)

        if self.where == "attribute":
            if self.table is None:
                self.table = made()
            return self.table
        tables: dict[int, Any] = self.own.tables if self.where == "object" else self.nested["tables"]
        if WIDTH not in tables:
            tables[WIDTH] = made()
        return tables[WIDTH]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "two names":
            return x + self.other(torch.tanh(self.linear(x)))
        return x + torch.tanh(self.linear(x)) * self.kept(x)


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("where", ["attribute", "object", "dictionary", "two names"])
def test_no_tensor_without_values_is_left_in_a_model(where: str, layers: int) -> None:
    """It is called for the first time while it is captured."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*(Keeping(where) for _ in range(layers))).double(),
        torch.randn(3, WIDTH).double(),
    )
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    program = graphopt.capture(model, x)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
    result = model(x)
    assert type(result) is torch.Tensor
    torch.testing.assert_close(program(x), result, rtol=1e-12, atol=1e-12)


def test_no_hook_is_left_where_a_capture_is_interrupted() -> None:
    class Interrupted(nn.Linear):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Interrupted(WIDTH, WIDTH)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.inner(*inputs)

    model = Passing()
    with pytest.raises(KeyboardInterrupt):
        graphopt.capture(model, torch.randn(3, WIDTH))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(type(p) is nn.Parameter for p in model.parameters())
