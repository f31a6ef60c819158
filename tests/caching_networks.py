"""Decoders for which a cache needs care."""

from __future__ import annotations

import torch
from torch import nn


class TwoTypes(nn.Module):
    """A decoder with a table of positions, and one of two rows for token types, which are all the same."""

    def __init__(self, positions: int, offset: int):
        super().__init__()
        torch.manual_seed(0)
        self.offset = offset
        self.embed, self.types = nn.Embedding(20, 8), nn.Embedding(2, 8)
        self.places = nn.Embedding(positions + offset, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        places = torch.arange(input_ids.shape[1]) + self.offset
        x = self.embed(input_ids) + self.places(places) + self.types(torch.zeros_like(places))
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.head(x + mixed.squeeze(1)) * 5}
