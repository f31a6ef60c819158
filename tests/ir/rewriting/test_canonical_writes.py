"""Writes in place become values: through views, stale views and copies, or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.frontends.compare import compare_outputs
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.checking.verify import verify
from graphopt.ir.schema import is_mutable

D = torch.float64
Function = Callable[[Any, torch.Tensor], Any]


class Model(nn.Module):
    """A function of two matrices, a vector, a buffer and the input times a matrix."""

    def __init__(self, function: Function):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.w = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=D))
        self.b = nn.Parameter(torch.randn(8, generator=generator, dtype=D))
        self.register_buffer("table", torch.randn(8, generator=generator, dtype=D))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def draw(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch), dtype=D)


def same_at_two_sizes(model: nn.Module) -> None:
    program = capture_module(model, draw(2, 5), compare=False)
    verify(program)
    assert not any(is_mutable(node.target) for node in program.graph.nodes)
    varies = [not isinstance(size, int) for size in program.signature.inputs["x"].shape]
    for shape in ((2, 5), (3 if varies[0] else 2, 7 if varies[1] else 5)):
        assert compare_outputs(program, model, {"x": draw(*shape)}) < 1e-12, program.text()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda h: h[..., 1:],
    "steps": lambda h: h[..., ::2],
    "select": lambda h: h[:, 0],
    "narrow": lambda h: h.narrow(-1, 0, h.shape[-1] - 1),
    "transpose": lambda h: h.transpose(0, -1),
    "movedim": lambda h: h.movedim(0, -1),
    "mT": lambda h: h.mT,
    "permute": lambda h: h.permute(*range(1, h.dim()), 0),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "squeeze": lambda h: h.squeeze(0),
    "flatten": lambda h: h.flatten(0, 1),
    "reshape": lambda h: h.reshape(h.shape[0], -1),
    "chunk": lambda h: h.chunk(2, -1)[0],
    "unbind": lambda h: h.unbind(-1)[-1],
    "expand_as": lambda h: h.expand_as(h),
    "alias": lambda h: h.detach(),
    "contiguous": lambda h: h.contiguous(),
    "clone": lambda h: h.clone(),
    "cast": lambda h: h.to(D),
    "dropout": lambda h: F.dropout(h, 0.3, training=False),
}
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda h: h.add_(1.5),
    "multiply": lambda h: h.mul_(-0.5),
    "copy": lambda h: h.copy_(h.sum(-1, keepdim=True)),
    "zero": lambda h: h.zero_(),
    "fill": lambda h: h.fill_(0.25),
    "clamp": lambda h: h.clamp_(-0.5, 0.5),
    "activate": lambda h: F.relu(h, inplace=True),
    "mask": lambda h: h.masked_fill_(h > 0.3, 2.0),
    "index": lambda h: h.__setitem__((..., torch.tensor([0])), 3.0),
    "own sum": lambda h: h.add_(h * 0.5),
}


class Memory(nn.Module):
    """Views of views of one value, written to in a random order, all read at the end."""

    def __init__(self, actions: list[tuple[str, int]]):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=D))
        self.actions = actions

    def forward(self, x: torch.Tensor) -> Any:
        values = [x @ self.w]
        for name, which in self.actions:
            value = values[which % len(values)]
            if name in WRITES:
                WRITES[name](value)
            elif value.dim() > 1:
                values.append(VIEWS[name](value))
        return [value * 1.0 for value in values]


@settings(max_examples=examples(66), deadline=None)
@given(
    views=st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), st.integers(0, 3)), min_size=1, max_size=3),
    writes=st.lists(st.tuples(st.sampled_from(sorted(WRITES)), st.integers(0, 3)), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_random_writes_through_random_views(views: Any, writes: Any, order: Any) -> None:
    """Wrong if a write missed a view of the same memory, or reached a copy of it."""
    actions = [*views, *writes]
    order.shuffle(actions)
    model = Memory(actions)
    try:
        for shape in ((2, 5), (3, 7)):
            model(draw(*shape))
    except (RuntimeError, IndexError):
        return  # not a program of torch: some views cannot be made or written to
    try:
        same_at_two_sizes(model)
    except graphopt.CaptureError as error:
        assert "no functional form" in str(error) or "cannot capture" in str(error), error


def _into_empty(p: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape)
    out[..., :4] = x[..., 4:]
    out[..., 4:] = -x[..., :4]
    return out @ p.w


def _scatter(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = x @ p.w
    h.scatter_(2, torch.zeros(*h.shape[:2], 1, dtype=torch.long), 7.0)
    h.index_add_(2, torch.tensor([1, 6]), x[..., :2])
    h[h > 2] = 0.5
    return h


def _stale(p: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x @ p.w
    early, late = h[..., :4], h[..., 2:6]
    early.add_(1)
    late.mul_(3)
    early.sub_(h[..., 4:])
    return h, early + 0.5, late + 0.5


def _copied_reshape(p: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x @ p.w
    copy = h.transpose(1, 2).reshape(h.shape[0], -1)
    copy.add_(1)
    return h + 0.5, copy


def _narrow_type(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = (x @ p.w).to(torch.float32)
    h.add_(x)
    return h.to(D)


def _diagonal(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = x @ p.w
    h.view(*h.shape[:2], 2, 4).diagonal(1, -2, -1).mul_(5)
    return h


def _tensor_filler(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = x @ p.w
    h[:, 0].fill_(p.b[0])
    return h


@pytest.mark.parametrize(
    "function", [_into_empty, _scatter, _stale, _copied_reshape, _narrow_type, _diagonal, _tensor_filler]
)
def test_writes_that_models_make(function: Function) -> None:
    """Wrong if a model that fills buffers piece by piece, as DeepSeek does, lost a piece."""
    same_at_two_sizes(Model(function))


REFUSED: dict[str, tuple[Function, str]] = {
    "an input": (lambda p, x: x.add_(1) @ p.w, "an input in place"),
    "a view of an input": (lambda p, x: (x[:, 0].mul_(2), x @ p.w)[1], "an input in place"),
    "an alias of an input": (lambda p, x: (x.contiguous().add_(1), x @ p.w)[1], "an input in place"),
    "an input after dropout": (
        lambda p, x: (F.dropout(x, 0.1, training=False).add_(1), x @ p.w)[1], "an input in place",
    ),
    "a weight": (lambda p, x: (p.b.detach().add_(1), x + p.b)[1], "a weight in place"),
    "a view of a weight": (lambda p, x: (p.b[:2].zero_(), x + p.b)[1], "a weight in place"),
    "a buffer": (lambda p, x: (p.table.mul_(2), x + p.table)[1], "a weight in place"),
    "another operand": (lambda p, x: torch.add(x, 1, out=x @ p.w), "writes to out"),
    "overlapping memory": (
        lambda p, x: (h := x @ p.w, torch.as_strided(h, (2, 2), (1, 1)).add_(1), h)[2], "no functional form",
    ),
    "a part of a size that varies": (
        lambda p, x: (h := x @ p.w, h.split(h.shape[1] // 2 + 1, 1)[0].add_(1), h)[2], "no functional form",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_writes_that_leave_the_program_are_refused(name: str) -> None:
    """Wrong if a model that changes its inputs or weights were captured without that effect."""
    function, reason = REFUSED[name]
    model = Model(function)
    held = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(graphopt.CaptureError, match=reason) as caught:
        capture_module(model, draw(2, 5))
    assert caught.value.node or "cannot capture" in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, held[key]), f"capturing changed {key}"


def test_a_mutable_operator_never_verifies() -> None:
    """Wrong if a pass could bring a write back into a graph in which order no longer matters."""
    program = capture_module(Model(lambda p, x: torch.relu(x @ p.w)), draw(2, 5))
    relu = program.node("relu")
    relu.target = torch.ops.aten.relu_.default
    with pytest.raises(graphopt.VerificationError, match="writes in place"):
        verify(program)
