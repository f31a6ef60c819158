"""Small decoders whose attention, decays, windows or masks are written out in ways that published models use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LONGEST = 24, 16, 2, 48


class Decoder(nn.Module):
    """One layer, in whose middle a mixer stands that a subclass writes out."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("lower", torch.tril(torch.ones(LONGEST, LONGEST)), persistent=False)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (
            t.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        return q, k, v

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(x + self.mix(x)) * 4}

    def together(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (weights @ v).transpose(1, 2).flatten(2)


class MaskedByProduct(Decoder):
    """Scores are multiplied by the mask, and what is hidden gets a low score by its opposite, as in the first GPT."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        seen = self.lower[:n, :n]
        scores = (q @ k.transpose(-1, -2)) * seen + -1e4 * (1 - seen)
        return self.together(scores.softmax(-1), v)


class MaskOfConstants(Decoder):
    """Groups of tokens are read from integers of the shape of activations, as those of images in a text."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        groups = torch.where(torch.zeros_like(x, dtype=torch.int32)[..., 0] == 1, 0, -1)
        index = torch.arange(x.shape[1])
        same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, :, None]
        seen = (index[None, :] <= index[:, None]) | same
        mask = torch.where(seen[:, None], 0.0, torch.finfo(torch.float32).min)
        return self.together((q @ k.transpose(-1, -2) + mask).softmax(-1), v)


class MaskOfTheScores(Decoder):
    """The mask is expanded to the shape of the scores, and keys begin with an empty cache, as in XLM."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        k, v = (torch.cat([torch.tensor([]), t], dim=-2) for t in (k, v))
        index = torch.arange(x.shape[1])
        seen = index[None, None, :] <= index[None, :, None].repeat(x.shape[0], 1, 1)
        scores = q @ k.transpose(-1, -2)
        hidden = (seen == 0).view(x.shape[0], 1, x.shape[1], -1).expand_as(scores)
        return self.together(scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1), v)


class CountedExperts(Decoder):
    """Choices of all tokens are marked in zeros with one row for each token of each text, as in JetMoE."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        flat = self.norm(x).reshape(-1, WIDTH)
        values, chosen = flat.topk(3, dim=1)
        gates = torch.zeros([flat.shape[0], WIDTH], dtype=flat.dtype).scatter(1, chosen, values.softmax(1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return mixed + (gates * flat).view(x.shape)


class OwnSinks(Decoder):
    """Every token computes a further score for each head, whose value counts nothing, as in Inkling."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.sink = nn.Linear(WIDTH, HEADS)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        hidden = self.lower[:n, :n] == 0
        scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
        sinks = self.sink(x).permute(0, 2, 1).unsqueeze(-1)
        return self.together(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], v)


class AmongOwnValues(Decoder):
    """Attention over the parts of one token, beside one over tokens."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        parts = torch.stack([x, self.norm(x), x.square()], 2)
        own = F.scaled_dot_product_attention(parts[:, :, :1], parts, parts).squeeze(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) + own


class Windows(Decoder):
    """A short convolution whose weights every token computes for itself."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.taps = nn.Linear(WIDTH, 3)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        last = F.pad(self.norm(x).transpose(1, 2), (2, 0))[..., -x.shape[1] - 2 :].unfold(-1, 3, 1)
        return (last.permute(0, 2, 1, 3) * self.taps(x).unsqueeze(2)).sum(-1)


class Retention(Decoder):
    """Products with a table of decays, block by block with a state between blocks, as in MiniMax.

    Args:
        block: tokens of a block.
        broken: change the table so that it is none of decays.
    """

    def __init__(
        self, seed: int = 0, block: int = LONGEST, broken: str = "", dtype: torch.dtype = torch.float32
    ):
        super().__init__(seed)
        self.block = block
        slope = torch.rand(HEADS, 1, 1, dtype=dtype) + 0.05
        distance = torch.arange(block)[:, None] - torch.arange(block)
        table = torch.exp(-slope * distance.clamp(min=0)) * (distance >= 0)
        if broken == "later":
            table[:, 0, 1] = 0.5
        elif broken == "uneven":
            table[:, 3, 0] *= 1.5
        elif broken == "growing":
            table = torch.exp(0.05 * slope * distance.clamp(min=0)) * (distance >= 0)
        self.register_buffer("slope", slope)
        self.register_buffer("table", table[None])
        self.register_buffer("from_state", torch.exp(-slope * (torch.arange(block)[None, :, None] + 1)))
        self.register_buffer("to_state", torch.exp(-slope * (block - 1 - torch.arange(block)[None, :, None])))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        state = torch.zeros(x.shape[0], HEADS, q.shape[-1], v.shape[-1], dtype=x.dtype)
        found = []
        for i in range((n + self.block - 1) // self.block):
            first, last = i * self.block, min((i + 1) * self.block, n)
            size = last - first
            a, b, c = (t[:, :, first:last] for t in (q, k, v))
            inside = ((a @ b.transpose(-1, -2)) * self.table[:, :, :size, :size]) @ c
            found.append((a * self.from_state[:, :size]) @ state + inside)
            state = (
                state * torch.exp(-self.slope * size) + (b * self.to_state[:, -size:]).transpose(-1, -2) @ c
            )
        return torch.cat(found, dim=-2).transpose(1, 2).flatten(2)


MIXERS: dict[str, Callable[[int], Any]] = {
    "masked by a product": MaskedByProduct,
    "mask of constants": MaskOfConstants,
    "mask of the scores": MaskOfTheScores,
    "counted experts": CountedExperts,
    "own sinks": OwnSinks,
    "among own values": AmongOwnValues,
    "windows": Windows,
    "retention": Retention,
}
