"""Mixtures that loop over the experts that were hit, traced as loops over all experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.frontends.untraceable import traceable

TOKENS = torch.export.Dim("tokens", min=1, max=64)


class Loop(nn.Module):
    """Four experts as one tensor; choices are of four experts and one that none has, or repeated."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.separate = nn.ModuleDict({f"expert_{i}": nn.Linear(8, 8) for i in range(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        if self.form == "repeated":
            chosen = chosen % 2
        places = 5 if self.form == "a place for no expert" else 4
        table = F.one_hot(chosen, num_classes=places).permute(2, 1, 0)
        total = torch.zeros_like(x)
        for expert in torch.greater(table.sum(dim=(-1, -2)), 0).nonzero():
            if self.form == "numbers":
                number = int(expert.item())
                place, token = torch.where(table[number].squeeze(0))
                if token.numel() == 0:
                    continue
                rows = F.linear(x[token], self.experts[number])
            elif self.form == "modules":
                place, token = torch.where(table[expert].squeeze(0))
                rows = self.separate[f"expert_{expert[0]}"](x[None, token].reshape(-1, 8))
            else:
                expert = expert[0]
                place, token = torch.where(table[expert])
                rows = x[token] @ self.experts.view(-1, 8, 8)[expert]
            total.index_add_(0, token, rows.relu() * weights[token, place, None])
        return total


@pytest.mark.parametrize("form", ["numbers", "modules", "a place for no expert", "repeated"])
def test_all_experts_run_where_those_hit_did(form: str) -> None:
    """Wrong if an expert ran for tokens that did not choose it, or once for one that was chosen twice."""
    loop = Loop(form).eval()
    with torch.no_grad(), traceable():
        exported = torch.export.export(loop, (torch.randn(6, 8),), dynamic_shapes=({0: TOKENS},))
    with torch.no_grad():
        for count in (1, 6, 33):
            x = torch.randn(count, 8)
            assert torch.allclose(exported.module()(x), loop(x), atol=1e-5)


def test_tokens_of_an_expert_are_not_taken_for_all() -> None:
    """Wrong if a sum over the tokens that chose an expert became one over all tokens."""

    class Mean(Loop):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = F.one_hot(self.router(x).topk(2)[1], num_classes=4).permute(2, 1, 0)
            total = x
            for expert in torch.greater(table.sum(dim=(-1, -2)), 0).nonzero():
                _, token = torch.where(table[expert[0]])
                total = total + token.float().mean()
            return total

    with pytest.raises(Exception, match="tokens that chose an expert"), traceable():
        torch.export.export(Mean("").eval(), (torch.randn(6, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_that_is_cast_on_every_call(dtype: torch.dtype) -> None:
    """Wrong if tracing stopped at the cast, left the model cast, or computed in another type than the model."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.router = self.router.to(torch.float32)
            scores: torch.Tensor = self.router(x.float()).softmax(-1).to(x.dtype)
            return scores

    model, x = Cast().to(dtype).eval(), torch.randn(3, 8, dtype=dtype)
    with torch.no_grad(), traceable():
        exported = torch.export.export(model, (x,))
    assert model.router.weight.dtype is dtype
    assert isinstance(model.router.weight, nn.Parameter)
    with torch.no_grad():
        assert torch.allclose(exported.module()(x), model(x), atol=1e-6)
