"""Networks shaped like those of diffusion: blocks modulated by a time, and a U with attention to a text."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def embedded(times: torch.Tensor, width: int) -> torch.Tensor:
    """Return sines and cosines of times."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = times[:, None].float() * rates[None]
    return torch.cat([angles.sin(), angles.cos()], -1)


class ModulatedBlock(nn.Module):
    """Attention and a feed-forward, scaled, shifted and gated by what is known of the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width, elementwise_affine=False)
        self.second = nn.LayerNorm(width, elementwise_affine=False)
        self.joined, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation, self.heads = nn.Linear(width, 6 * width), heads

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        parts = self.modulation(functional.silu(condition)).unsqueeze(1).chunk(6, -1)
        y = self.first(x) * (1 + parts[0]) + parts[1]
        q, k, v = self.joined(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + parts[2] * self.out(attended)
        return x + parts[5] * self.ffn(self.second(x) * (1 + parts[3]) + parts[4])


class DiffusionTransformer(nn.Module):
    """Patches of a latent, a time and a class."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patches, self.classes = nn.Conv2d(4, width, 2, 2), nn.Embedding(11, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ModulatedBlock(width, 4) for _ in range(layers))
        self.out, self.width = nn.Linear(width, 16), width

    def forward(
        self, hidden_states: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        x = self.patches(hidden_states).flatten(2).transpose(1, 2)
        condition = self.time(embedded(timesteps, self.width)) + self.classes(class_labels)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


class ResidualBlock(nn.Module):
    """Two convolutions, between which a time is added."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(4, before), nn.GroupNorm(4, after)
        self.into, self.out = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.time = nn.Linear(time, after)
        self.short = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.into(functional.silu(self.first(x))) + self.time(functional.silu(time))[:, :, None, None]
        return self.short(x) + self.out(functional.silu(self.second(h)))


class CrossAttention(nn.Module):
    """Places of an image that look at a text."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.norm, self.q = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(text, width, bias=False), nn.Linear(text, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)
        pairs = ((self.q, self.norm(y)), (self.k, text), (self.v, text))
        q, k, v = (layer(value).unflatten(-1, (4, -1)).transpose(1, 2) for layer, value in pairs)
        y = y + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y.transpose(1, 2).reshape(x.shape)


class ConditionalUNet(nn.Module):
    """Down and up once, with a text at each size."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.into = nn.Linear(16, 32), nn.Conv2d(4, 16, 3, padding=1)
        self.down, self.middle, self.up = (
            ResidualBlock(*sizes) for sizes in ((16, 16, 32), (32, 32, 32), (48, 16, 32))
        )
        self.text = nn.ModuleList(CrossAttention(width, 24) for width in (16, 32, 16))
        self.smaller, self.out = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        time = self.time(embedded(timestep, 16))
        x = self.text[0](self.down(self.into(sample), time), encoder_hidden_states)
        y = self.text[1](self.middle(self.smaller(x), time), encoder_hidden_states)
        y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return self.out(self.text[2](self.up(torch.cat([y, x], 1), time), encoder_hidden_states))
