"""Capture by stamping where layers are equal and what lies between them is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_graph import both, require_same
from torch import nn
from torch.nn import functional

import graphopt
from graphopt.frontends.stamping.record import record
from graphopt.ir.facts import Capture

WIDTH = 8


class Layer(nn.Module):
    """A residual feed-forward layer that takes one more value, used as ``use`` says."""

    def __init__(self, number: int, use: Callable[[Layer, torch.Tensor, Any], Any]):
        super().__init__()
        self.number, self.use = number, use
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor, other: Any = None) -> Any:
        return self.use(self, x, other)


class Wired(nn.Module):
    """A list of equal layers, called as ``call`` says."""

    def __init__(self, use: Callable[..., Any], call: Callable[[Wired, torch.Tensor], Any], layers: int = 9):
        super().__init__()
        self.layers = nn.ModuleList(Layer(n, use) for n in range(layers))
        self.embed, self.norm, self.call = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


# -- what a layer does with the other value ------------------------------------------------------------


def adds(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    return x + layer.block(x if other is None else x + other)


def counts(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    other["called"] = other.get("called", 0) + 1
    y = layer.block(x)
    return x + (y if other["called"] < 5 else torch.relu(y))


def measures(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    return x + layer.block(x), x.shape[0]


def projects(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    y = x + layer.block(x)
    return y if other is None else y + functional.linear(functional.linear(x, other), other.T)


def writes_beside(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    other[..., 0].add_(1)
    return x + layer.block(x)


def writes_stream(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    x[:].add_(layer.block(x))


def activates_first(layer: Layer, x: torch.Tensor, other: Any) -> Any:
    return layer.down(torch.tanh(layer.up(torch.tanh(x))))


# -- how layers are called -----------------------------------------------------------------------------


def in_turn(model: Wired, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def skip(model: Wired, x: torch.Tensor) -> torch.Tensor:
    """One layer reads what one far before it made."""
    x, kept = model.embed(x), None
    for number, layer in enumerate(model.layers):
        x = layer(x, kept if number == 7 else None)
        kept = x if number == 3 else kept
    return model.norm(x)


def context(model: Wired, x: torch.Tensor) -> torch.Tensor:
    """All later layers read what one layer made."""
    x, kept = model.embed(x), None
    for number, layer in enumerate(model.layers):
        x = layer(x, kept)
        kept = x if number == 3 else kept
    return model.norm(x)


def counted(model: Wired, x: torch.Tensor) -> torch.Tensor:
    state: dict[str, int] = {}
    x = model.embed(x)
    for layer in model.layers:
        x = layer(x, state)
    return model.norm(x)


def measured(model: Wired, x: torch.Tensor) -> torch.Tensor:
    x, rows = model.embed(x), 0
    for layer in model.layers:
        x, rows = layer(x)
    return model.norm(x) / rows


def beside(model: Wired, x: torch.Tensor) -> torch.Tensor:
    """All layers write to one table, through views of it."""
    x, table = model.embed(x), torch.zeros(3, dtype=x.dtype)
    for layer in model.layers:
        x = layer(x, table)
    return model.norm(x) * table.sum()


def changed(model: Wired, x: torch.Tensor) -> torch.Tensor:
    """A table that layers read is written to on the way, through a view of it."""
    x, table = model.embed(x), torch.ones(WIDTH, dtype=x.dtype)
    for number, layer in enumerate(model.layers):
        if number == 5:
            table[:3].mul_(2)
        x = layer(x, table)
    return model.norm(x)


def returned_nothing(model: Wired, x: torch.Tensor) -> torch.Tensor:
    x = model.embed(x)
    for layer in model.layers:
        layer(x)
    return model.norm(x)


def reads_weight(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(in_turn(model, model.embed(x)), model.layers[3].up.weight)


def shares_weight(model: Wired, x: torch.Tensor) -> torch.Tensor:
    x = model.embed(x)
    for number, layer in enumerate(model.layers):
        x = layer(x, model.layers[3].up.weight if number > 3 else None)
    return model.norm(x)


WIRINGS: dict[str, Callable[[], Wired]] = {
    "skip": lambda: Wired(adds, skip),
    "context": lambda: Wired(adds, context),
    "counted": lambda: Wired(counts, counted),
    "measured": lambda: Wired(measures, measured),
    "beside": lambda: Wired(writes_beside, beside),
    "changed": lambda: Wired(adds, changed),
    "written": lambda: Wired(writes_stream, returned_nothing),
    "weight read": lambda: Wired(projects, reads_weight),
    "weight shared": lambda: Wired(projects, shares_weight),
    "activated": lambda: Wired(activates_first, in_turn),
}


def require_right(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> str:
    """Capture with and without a comparison, and fully; return how it was captured."""
    stamped, full = both(lambda: graphopt.capture(model, x), monkeypatch)
    require_same(stamped, full)
    unchecked = graphopt.capture(model, x, compare=False)
    for size in (x, torch.cat([x, x, x])):
        for program in (stamped, unchecked):
            torch.testing.assert_close(program(size), model(size), rtol=1e-11, atol=1e-11)
    return stamped.facts[Capture].layers


@pytest.mark.parametrize("name", WIRINGS)
def test_values_and_weights_that_pass_layers_by(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = WIRINGS[name]().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    how = require_right(model, x, monkeypatch)
    if name in ("skip", "context", "changed", "weight shared"):
        assert "copied" in how, how


class Convolution(nn.Module):
    """A convolutional layer; one of them makes sequences shorter."""

    def __init__(self, shorten: Callable[[torch.Tensor], torch.Tensor] | None):
        super().__init__()
        self.convolution, self.shorten = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), shorten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.convolution(x)) * x.mean(-1, keepdim=True)
        return x if self.shorten is None else self.shorten(x)


@pytest.mark.parametrize(
    "shorten",
    [
        lambda x: functional.avg_pool1d(x, 2),
        # at the size of the example, they change nothing
        lambda x: functional.adaptive_avg_pool1d(x, 12),
        lambda x: x[..., :12],
    ],
    ids=["halved", "to a size", "cut"],
)
def test_layers_behind_one_that_changes_sizes(
    shorten: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Convolution(shorten if n == 4 else None) for n in range(9))).double()
    require_right(model, torch.randn(3, WIDTH, 12, dtype=torch.float64), monkeypatch)


class Late(nn.Module):
    """A layer that does what only sets in late, where tensors without values do not show it."""

    def __init__(self, number: int, what: str):
        super().__init__()
        self.late, self.what, self.linear = number >= 4, what, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.ones(WIDTH), persistent=not (self.late and what == "persistent"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "autocast":
            with torch.autocast("cpu", torch.bfloat16, enabled=self.late):
                return x + self.linear(x)
        if self.what == "tuple":
            y = self.linear(x)
            return x * y[[0, 1, 2], (2, 0, 1) if self.late else (0, 1, 2)][:, None]
        return x + self.linear(x) * self.table


@pytest.mark.parametrize("what", ["autocast", "tuple", "persistent"])
def test_what_tensors_without_values_do_not_show(what: str) -> None:
    model = nn.Sequential(*(Late(n, what) for n in range(7)))
    layers = record(model, {"input": torch.randn(3, WIDTH)}).layers
    assert [layer.key == layers[1].key for layer in layers] == [True] * 4 + [False] * 3
