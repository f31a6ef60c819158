"""Networks with training-time branches, written by hand after the papers that introduced them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module in evaluation mode with statistics, scales and biases as training could leave them."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if part.affine:
                part.weight.data = torch.randn(part.num_features, generator=generator)
                part.bias.data = torch.randn(part.num_features, generator=generator)
            if part.track_running_stats:
                part.running_mean.data = torch.randn(part.num_features, generator=generator)
                part.running_var.data = torch.rand(part.num_features, generator=generator) * 3
                part.running_var.data[0] = 1e-7
        for parameter in part.parameters(recurse=False):
            if parameter.dim() < 2 and not isinstance(part, nn.modules.batchnorm._BatchNorm):
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return module.eval()


def conv_bn(i: int, o: int, k: int | tuple[int, int], **options: object) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    return nn.Sequential(nn.Conv2d(i, o, k, bias=False, **options), nn.BatchNorm2d(o))  # type: ignore[arg-type]


class Sum(nn.Module):
    """A sum of branches over one input."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def repvgg_block(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """3x3 + 1x1 + identity, a BatchNorm each (arXiv 2101.03697)."""
    branches: list[nn.Module] = [
        conv_bn(i, o, 3, stride=stride, padding=1, groups=groups),
        conv_bn(i, o, 1, stride=stride, groups=groups),
    ]
    if i == o and stride == 1:
        branches.append(nn.BatchNorm2d(i))
    return nn.Sequential(Sum(*branches), nn.ReLU())


def repvgg() -> nn.Module:
    """Stages with strides and groups."""
    return nn.Sequential(
        repvgg_block(3, 8, 2), repvgg_block(8, 8), repvgg_block(8, 16, 2, groups=2), repvgg_block(16, 16, groups=4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def mobileone_block(i: int, o: int, stride: int = 1, copies: int = 3) -> nn.Module:
    """Depthwise, then pointwise, both over-parameterised (arXiv 2206.04040)."""
    depthwise: list[nn.Module] = [conv_bn(i, i, 3, stride=stride, padding=1, groups=i) for _ in range(copies)]
    depthwise.append(conv_bn(i, i, 1, stride=stride, groups=i))
    if stride == 1:
        depthwise.append(nn.BatchNorm2d(i))
    pointwise: list[nn.Module] = [conv_bn(i, o, 1) for _ in range(copies)]
    if i == o:
        pointwise.append(nn.BatchNorm2d(i))
    return nn.Sequential(Sum(*depthwise), nn.ReLU(), Sum(*pointwise), nn.ReLU())


def mobileone() -> nn.Module:
    """A few blocks."""
    return nn.Sequential(mobileone_block(3, 8, 2), mobileone_block(8, 8), mobileone_block(8, 12, 2))


def acnet() -> nn.Module:
    """Square + horizontal + vertical kernels (arXiv 1908.03930)."""

    def block(i: int, o: int) -> nn.Module:
        square = conv_bn(i, o, 3, padding=1)
        return nn.Sequential(
            Sum(square, conv_bn(i, o, (1, 3), padding=(0, 1)), conv_bn(i, o, (3, 1), padding=(1, 0))),
            nn.ReLU(),
        )

    return nn.Sequential(block(3, 8), block(8, 8))


class BorderNorm(nn.Module):
    """BatchNorm whose zero padding is filled with what the norm makes of zero, as DBB pads."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        p = self.padding
        if p:
            n = self.norm
            border = n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)  # type: ignore[operator, arg-type]
            y = F.pad(y, [p] * 4)
            border = border.view(1, -1, 1, 1)
            y[:, :, 0:p, :] = border
            y[:, :, -p:, :] = border
            y[:, :, :, 0:p] = border
            y[:, :, :, -p:] = border
        return y


def diverse_branch_block(i: int, o: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """KxK + 1x1 + 1x1-KxK + 1x1-average (arXiv 2103.13425)."""
    p = kernel // 2
    sequence = nn.Sequential(
        nn.Conv2d(i, i, 1, bias=False), BorderNorm(i, p), nn.Conv2d(i, o, kernel, stride, bias=False),
        nn.BatchNorm2d(o),
    )  # fmt: skip
    average = nn.Sequential(
        nn.Conv2d(i, o, 1, bias=False), BorderNorm(o, p), nn.AvgPool2d(kernel, stride), nn.BatchNorm2d(o)
    )
    return Sum(
        conv_bn(i, o, kernel, stride=stride, padding=p), conv_bn(i, o, 1, stride=stride), sequence, average
    )


def dbb() -> nn.Module:
    """Two diverse branch blocks."""
    return nn.Sequential(diverse_branch_block(3, 6), nn.ReLU(), diverse_branch_block(6, 8, 3, 2), nn.ReLU())


class Residual(nn.Module):
    """Plain conv-BN with a skip, projected where sizes change."""

    def __init__(self, i: int, o: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(i, o, 3, stride=stride, padding=1), nn.ReLU(), conv_bn(o, o, 3, padding=1)
        )
        self.skip = nn.Identity() if i == o and stride == 1 else conv_bn(i, o, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    """A stem and three residual blocks."""
    return nn.Sequential(
        conv_bn(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Residual(8, 8), Residual(8, 16, 2), Residual(16, 16),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (arXiv 1801.04381)."""

    def __init__(self, channels: int):
        super().__init__()
        wide = channels * 4
        self.body = nn.Sequential(
            conv_bn(channels, wide, 1), nn.ReLU6(), conv_bn(wide, wide, 3, padding=1, groups=wide), nn.ReLU6(),
            conv_bn(wide, channels, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def mobilenet() -> nn.Module:
    """A stem and two inverted residuals."""
    return nn.Sequential(
        conv_bn(3, 8, 3, stride=2, padding=1), nn.ReLU6(), InvertedResidual(8), InvertedResidual(8)
    )


# name: (network, convolutions that are left)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "repvgg": (repvgg, 4), "mobileone": (mobileone, 6), "acnet": (acnet, 2), "dbb": (dbb, 2),
    "resnet": (resnet, 8), "mobilenet": (mobilenet, 7),
}  # fmt: skip
