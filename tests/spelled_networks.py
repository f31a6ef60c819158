"""Small networks in many spellings, for tests of what capture makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from graphopt.ir.rewriting.cleanup import DROPOUTS

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


def step(**operators: int) -> Callable[[Step], Step]:
    """Register a spelling of (batch, length, 8) -> same, and the operators it must become."""

    def register(function: Step) -> Step:
        STEPS[function.__name__] = (function, {name.replace("__", "."): n for name, n in operators.items()})
        return function

    return register


@step(aten__linear=1)
def matmul_transposed(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ p.w.T + p.b


@step(aten__linear=1)
def matmul_plain(p: Any, x: torch.Tensor) -> torch.Tensor:
    return p.b + torch.matmul(x, p.w)


@step(aten__linear=1)
def conv1d_of_gpt2(p: Any, x: torch.Tensor) -> torch.Tensor:
    # any layout: the step before may leave a transposed one
    return torch.addmm(p.b, x.reshape(-1, x.size(-1)), p.w).view(x.size())


@step(aten__linear=1)
def flattened_mm(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.flatten(0, 1), p.w.t()).unflatten(0, x.shape[:2])


@step(aten__linear=1)
def einsum_linear(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bsi,oi->bso", x, p.w)


@step(aten__linear=2)
def two_linears(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, p.w, p.b)), p.u)


@step(aten__contiguous=0, aten__clone=0, aten__view=0, aten__transpose=0)
def views_there_and_back(p: Any, x: torch.Tensor) -> torch.Tensor:
    h = x.transpose(1, 2).contiguous().mT.clone()
    h = h.view(h.shape[0], h.shape[1], 2, 4).swapaxes(2, 3).movedim(-1, 2).reshape(x.shape)
    return h.unsqueeze(1).squeeze(1).detach() * p.b


@step(aten__to=0, aten__type_as=0)
def casts_to_its_own_type(p: Any, x: torch.Tensor) -> torch.Tensor:
    return (x.to(D).double().type_as(p.b) * p.b).to(x.device)


@step(**{name.replace(".", "__"): 0 for name in DROPOUTS})
def dropouts(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(F.alpha_dropout(x * p.v, 0.1, training=False), 0.5, training=False)


@step(aten__chunk=0, aten__split=0)
def chunks_and_splits(p: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    a, b, c = torch.split(x, [1, 3, 4], dim=2)
    d, e = x.split(5, -1)
    return torch.cat((second, first), -1) + torch.cat((c, a, b), -1) * torch.cat((e, d), -1) * p.b


@step(aten__chunk=0, aten__linear=1)
def gated_in_one(p: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, p.wide).chunk(2, -1)
    return F.silu(gate) * up


@step(graphopt__rms_norm=1, aten__rsqrt=0)
def rms_written_out(p: Any, x: torch.Tensor) -> torch.Tensor:
    return p.v * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@step(graphopt__rms_norm=1)
def rms_divided(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=2, keepdim=True) + 1e-5) * (1 + p.v)


@step(graphopt__rms_norm=1)
def rms_by_power(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean([-1], True) + 1e-5) ** -0.5


@step(graphopt__rms_norm=1)
def rms_called(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (SIZE,), p.v)


@step(aten__layer_norm=1, aten__mean=0)
def layer_norm_written_out(p: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return p.b + p.v * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))


@step(aten__layer_norm=1, aten__var=0)
def layer_norm_by_variance(p: Any, x: torch.Tensor) -> torch.Tensor:
    spread = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) / spread * p.v.reshape(1, 1, SIZE) + p.b


@step(aten__layer_norm=1)
def layer_norm_decomposed(p: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.native_layer_norm(x, (SIZE,), p.v, p.b, 1e-5)[0]


def angle_table(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(x.shape[1], dtype=D)[:, None] * torch.arange(1, count + 1, dtype=D) / 7


@step(graphopt__rotary=1)
def rotary_in_halves(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = torch.cat((angle_table(x, 4),) * 2, -1)
    first, second = x[..., :4], x[..., 4:]
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


@step(graphopt__rotary=1)
def rotary_of_half_tables(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    cos, sin = angle_table(x, 4).cos(), angle_table(x, 4).sin()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + cos * second), -1)


@step(graphopt__rotary=1)
def rotary_in_pairs(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = angle_table(x, 4).repeat_interleave(2, -1)
    return x * angles.cos() + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * angles.sin()


@step(graphopt__rotary=1)
def rotary_of_pair_tables(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    cos, sin, even, odd = angle_table(x, 4).cos(), angle_table(x, 4).sin(), x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


@step(graphopt__rotary=0)
def rotary_turned_the_other_way(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    angles = torch.cat((angle_table(x, 4),) * 2, -1)
    return x * angles.cos() + torch.cat((x[..., 4:], -x[..., :4]), -1) * angles.sin()


@step(aten__index=0)
def constant_places(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * p.v
    return torch.cat((x[..., p.even], x[..., p.odd]), -1)


@step(graphopt__routed_ffn=1, aten__linear=1)
def mixture(p: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, SIZE)
    weights, chosen = torch.topk(torch.softmax(flat @ p.router.T, -1), 2, -1)
    ids, rows = chosen.reshape(-1), flat.repeat_interleave(2, dim=0)
    hidden = torch.bmm(p.experts_up[ids], rows.unsqueeze(-1)).squeeze(-1)
    gate, up = hidden.chunk(2, -1)
    out = torch.bmm(p.experts_down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    out = (out * weights.reshape(-1, 1)).view(-1, 2, SIZE).sum(1)
    return out.view(x.shape)


def every_expert(p: Any, flat: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts on every token times its score, stored input first."""
    rows = flat.repeat(3, 1) * scores.T.reshape(-1, 1)
    gate, up = torch.bmm(rows.view(3, -1, SIZE), p.experts_up.mT.contiguous()).chunk(2, -1)
    out = torch.bmm(up * F.silu(gate), p.experts_down.mT.contiguous())
    return out.reshape(-1, SIZE).view(3, -1, SIZE).sum(0)


@step(graphopt__routed_ffn=1, aten__linear=1)
def mixture_of_scored_inputs(p: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, SIZE)
    logits = flat @ p.router.T
    best, chosen = torch.topk(logits, 2, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best).sigmoid()
    return every_expert(p, flat, scores).view(x.shape)


@step(aten__mul=1)
def neutral_arithmetic(p: Any, x: torch.Tensor) -> torch.Tensor:
    return ((x + 0) * 1 - 0) / 1 * p.b
