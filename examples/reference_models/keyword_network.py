"""A causal temporal network with redundant branches, after RepCNN: what is trained is wider than what is run.

Each block is a depthwise temporal stage and a pointwise stage; each stage is a sum of branches with a
BatchNorm of their own: kernels of several lengths (aligned at the right, so that no frame sees a later one),
a scale a channel, the identity. For inference all branches of a stage are one convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class CausalConv1d(nn.Module):
    """A temporal convolution that sees the present frame and those before it; (batch, channels, frames)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1):
        super().__init__()
        self.reach = (kernel - 1) * dilation
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (self.reach, 0)))


class Branches(nn.Module):
    """A sum of branches, each with its own norm; ``kernels`` may name a length several times."""

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int],
        *,
        dilation: int = 1,
        groups: int = 1,
        identity: bool = True,
    ):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(CausalConv1d(channels, channels, k, dilation, groups), nn.BatchNorm1d(channels))
            for k in kernels
        )
        self.identity = nn.BatchNorm1d(channels) if identity else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.convolutions[0](x)
        for branch in self.convolutions[1:]:
            total = total + branch(x)
        return total if self.identity is None else total + self.identity(x)


class KeywordDetector(nn.Module):
    """Log mel bands to the logit that the keyword has just ended, frame by frame.

    Args:
        bands: of the input.
        channels: of every layer.
        dilations: one a block.
        kernels: lengths of the temporal branches; the longest is what runs in the end.
        pointwise: how many 1x1 branches the pointwise stages have.
        identity: add the input, normalised, as one more branch.

    Shapes:
        features: (batch, bands, frames).
        returns: (batch, frames).
    """

    def __init__(
        self,
        bands: int = 40,
        channels: int = 48,
        dilations: Sequence[int] = (1, 1, 2, 2, 4, 4),
        kernels: Sequence[int] = (9, 5, 3, 1),
        pointwise: int = 2,
        identity: bool = True,
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(bands, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        for dilation in dilations:
            blocks += [
                Branches(channels, kernels, dilation=dilation, groups=channels, identity=identity),
                nn.ReLU(),
                Branches(channels, [1] * pointwise, identity=identity),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv1d(channels, 1, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(features))).squeeze(1)


def clip_score(frames: torch.Tensor) -> torch.Tensor:
    """Logits of frames (batch, frames) to the score of each clip: the highest, after the first 30 frames."""
    return frames[:, 30:].amax(dim=1)
