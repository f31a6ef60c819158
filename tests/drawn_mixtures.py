"""Networks of mixtures for hypothesis to draw, whose routers can be told which experts there are and how many to take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from builders import D, Norm
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory


@dataclass(frozen=True)
class Routing:
    """How many experts there are, how many are active, and what their scores become."""

    experts: int = 4
    active: int = 2
    scores: str = "softmax"  # softmax, sigmoid, chosen: a softmax over the chosen alone
    divided: bool = False
    shared: bool = False


ROUTINGS = (
    Routing(experts=5, active=3),
    Routing(divided=True, shared=True),
    Routing(experts=6, active=3, scores="sigmoid", divided=True),
    Routing(scores="chosen"),
)
SIZE, WIDTH = 8, 6


class Mixture(nn.Module):
    """Gated experts on the tokens that a router sends them; ``there`` and ``active`` are for tests to change."""

    def __init__(self, routing: Routing, generator: torch.Generator):
        super().__init__()
        self.routing, self.active = routing, routing.active
        self.there: torch.Tensor | None = None

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=D) * shape[-1] ** -0.5)

        self.router = draw(routing.experts, SIZE)
        self.up, self.down = draw(routing.experts, 2 * WIDTH, SIZE), draw(routing.experts, SIZE, WIDTH)
        if routing.shared:
            self.beside = draw(SIZE, SIZE)

    def route(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights and the numbers of each token's experts, (tokens, active)."""
        logits, routing = F.linear(flat, self.router), self.routing
        if self.there is not None:
            logits = logits.masked_fill(~self.there, float("-inf"))
        if routing.scores == "chosen":
            best, chosen = torch.topk(logits, self.active, dim=-1)
            return torch.softmax(best, -1), chosen
        scores = torch.softmax(logits, -1) if routing.scores == "softmax" else torch.sigmoid(logits)
        weights, chosen = torch.topk(scores, self.active, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if routing.divided else weights), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, SIZE)
        weights, chosen = self.route(flat)
        ids, each = chosen.reshape(-1), flat.repeat_interleave(self.active, dim=0)
        gate, up = torch.bmm(self.up[ids], each.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = (out * weights.reshape(-1, 1)).view(-1, self.active, SIZE).sum(1)
        if self.routing.shared:
            out = out + F.linear(F.silu(flat), self.beside)
        return out.view(x.shape)


class Mixtures(nn.Module):
    """Tokens in, logits out; two mixtures with norms on the stream between."""

    def __init__(self, routing: Routing, seed: int = 0, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(23, SIZE, generator=generator, dtype=D))
        self.norms = nn.ModuleList(Norm(SIZE, "rms", generator) for _ in range(2))
        self.mixtures = nn.ModuleList(Mixture(routing, generator) for _ in range(2))
        with torch.no_grad():
            for mixture in self.mixtures:
                mixture.router.mul_(scale)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.embedding(input_ids, self.table)
        for norm, mixture in zip(self.norms, self.mixtures, strict=True):
            x = x + mixture(norm(x))
        return {"logits": F.linear(x, self.table)}


def rows(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return token numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 23, (batch, length), generator=generator)}


@lru_cache(maxsize=8)
def _captured(routing: Routing) -> Program:
    return graphopt.capture(Mixtures(routing).eval(), rows(2, 6))


@dataclass(frozen=True)
class Drawn:
    """A network of mixtures: its routing, the seed of its weights, and how sure its routers are."""

    routing: Routing
    seed: int
    scale: float

    @property
    def model(self) -> Mixtures:
        """The module, to be changed at will."""
        return Mixtures(self.routing, self.seed, self.scale).eval()

    @property
    def program(self) -> Program:
        """The captured module."""
        values = dict(self.model.named_parameters())
        made = _captured(self.routing).copy()
        for node, weight in list(made.weights.items()):
            if weight.name in values:
                made.weights[node] = weight.with_source(InMemory(values[weight.name].detach()))
        made.changed()
        return made


def mixtures() -> st.SearchStrategy[Drawn]:
    """Draw a network."""
    return st.builds(
        Drawn, st.sampled_from(ROUTINGS), st.integers(0, 1 << 20), st.sampled_from([0.3, 1.0, 4.0])
    )
