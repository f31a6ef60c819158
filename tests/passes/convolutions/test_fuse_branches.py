"""fuse-branches: the algebra on random networks, networks of the papers, and what must be refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from amounts import examples
from branch_networks import NETWORKS, Sum, conv_bn, randomised
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import PassRefusedError
from graphopt.ir.running.fold import fold
from graphopt.passes import FuseBranches

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Causal(nn.Module):
    """Pad at the near end of the last axis alone."""

    def __init__(self, reach: int, inner: nn.Module):
        super().__init__()
        self.reach, self.inner = reach, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.pad(x, (self.reach, 0)))


class Scale(nn.Module):
    """A constant affine map, a value a channel."""

    def __init__(self, channels: int, axes: int, shift: bool):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, *[1] * axes))
        self.beta = nn.Parameter(torch.randn(channels, *[1] * axes)) if shift else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.gamma
        return y if self.beta is None else y + self.beta


@st.composite
def branches(
    draw: st.DrawFn, axes: int, channels: int, outputs: int, stride: int, causal: bool, depth: int
) -> nn.Module:
    """A linear map over space or time, exact to fuse, from ``channels`` to ``outputs``."""
    divisors = [g for g in (1, 2, 4) if channels % g == 0 and outputs % g == 0]
    kinds = ["convolution", "sequence"]
    if channels == outputs:
        kinds += ["pool"]
        if stride == 1:
            kinds += ["identity", "norm", "scale"]
    if depth > 0 and stride == 1:
        kinds += ["nested"]
    kind = draw(st.sampled_from(kinds))

    def convolution(
        i: int, o: int, size: int, s: int, groups: int, bias: bool, padded: bool = True
    ) -> nn.Module:
        dilation = draw(st.sampled_from([1, 2])) if size > 1 else 1
        reach = dilation * (size - 1)
        if causal:
            made = CONVOLUTIONS[1](i, o, size, s, 0, dilation, groups, bias)
            return Causal(reach, made) if padded else made
        sizes: Any = size
        padding: Any = reach // 2 if padded else 0
        if axes == 2 and draw(st.booleans()) and size > 1:  # asymmetric
            sizes, padding = (size, 1), (reach // 2 if padded else 0, 0)
        return CONVOLUTIONS[axes](i, o, sizes, s, padding, dilation, groups, bias)  # type: ignore[abstract]

    size = draw(st.sampled_from([1, 2, 3, 4] if causal else [1, 3, 5]))
    groups = draw(st.sampled_from(divisors))
    if kind == "identity":
        return nn.Identity()
    if kind == "norm":
        return NORMS[axes](channels, affine=draw(st.booleans()))
    if kind == "scale":
        return Scale(channels, axes, draw(st.booleans()))
    if kind == "pool":
        if causal:
            return Causal(size - 1, nn.AvgPool1d(size, stride))
        return POOLS[axes](size, stride, size // 2, count_include_pad=True)
    if kind == "nested":
        inner = draw(branches(axes, channels, outputs, 1, causal, depth - 1))
        other = draw(branches(axes, channels, outputs, 1, causal, depth - 1))
        return nn.Sequential(Sum(inner, other), NORMS[axes](outputs))
    if kind == "sequence":
        middle = draw(st.sampled_from([channels, 2 * channels]))
        order = draw(st.sampled_from(["pointwise first", "pointwise last"]))
        if order == "pointwise first":
            first = convolution(channels, middle, 1, 1, 1, False)
            second = convolution(middle, outputs, size, stride, 1, draw(st.booleans()))
        else:
            first = convolution(channels, middle, size, stride, 1, draw(st.booleans()))
            second = convolution(middle, outputs, 1, 1, 1, draw(st.booleans()))
        return nn.Sequential(first, second, NORMS[axes](outputs))
    made = convolution(channels, outputs, size, stride, groups, draw(st.booleans()))
    return nn.Sequential(made, NORMS[axes](outputs)) if draw(st.booleans()) else made


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    axes = draw(st.sampled_from([1, 1, 2, 2, 3]))
    causal = axes == 1 and draw(st.booleans())
    channels = draw(st.sampled_from([2, 4]))
    outputs = draw(st.sampled_from([channels, channels, 4]))
    stride = draw(st.sampled_from([1, 1, 2]))
    count = draw(st.integers(1, 4))
    made = [draw(branches(axes, channels, outputs, stride, causal, 1)) for _ in range(count)]
    if not any(isinstance(m, tuple(CONVOLUTIONS.values())) for b in made for m in b.modules()):
        made.append(draw(branches(axes, channels, outputs, stride, causal, 0)))
    assume(any(isinstance(m, tuple(CONVOLUTIONS.values())) for b in made for m in b.modules()))
    torch.manual_seed(draw(st.integers(0, 1000)))
    network = nn.Sequential(nn.ReLU(), Sum(*made), nn.ReLU())
    randomised(network, draw(st.integers(0, 1000)))
    sizes = draw(st.sampled_from([(9, 12), (8, 13), (11, 10)]))
    x, y = (torch.randn(2, channels, *[s + i for i in range(axes)], dtype=torch.float64) for s in sizes)
    return network.double(), x, y


def fused(
    network: nn.Module, x: torch.Tensor, text: str = "fuse-branches{allow_no_match=true}"
) -> graphopt.Program:
    return graphopt.optimize(network, text, inputs=x)


def convolutions(program: graphopt.Program) -> int:
    return sum(count for name, count in program.operators.items() if "conv" in name)


def multiply_adds(program: graphopt.Program) -> float:
    total = 0.0
    for node in fold(program).graph.nodes:
        if "aten.conv" in str(node.target):
            weight = node.args[1].meta["val"]
            total += math.prod(weight.shape[1:]) * math.prod(sized(node))
    return total


def sized(node: Any) -> list[int]:
    return [s if isinstance(s, int) else s.node.hint for s in node.meta["val"].shape]


def error(program: graphopt.Program, network: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = network(x)
        return float((program(x) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@settings(max_examples=examples(36), deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_branches_fuse_exactly(made: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    """Wrong if a rule or a composition of rules is: kernels misplaced, groups mixed, borders shifted."""
    network, x, y = made
    program = fused(network, x)
    assert error(program, network, x) < 1e-10
    assert error(program, network, y) < 1e-10, "right at the captured size, wrong at another"
    before = graphopt.capture(network, x)
    assert multiply_adds(program) <= multiply_adds(before) * (1 + 1e-9) + pooled(before), "it grew"
    again = graphopt.optimize(program, "fuse-branches{allow_no_match=true}")
    assert again.report.passes[-1].sites == [], "fusing what was fused found more to fuse"
    grown = fused(network, x, "fuse-branches{allow_growth=true allow_no_match=true}")
    assert error(grown, network, y) < 1e-10
    assert convolutions(grown) <= convolutions(program)


def pooled(program: graphopt.Program) -> float:
    """Multiply-adds of what is no convolution: a pooling's window, one a value for norms, scales and shifts."""
    total = 0.0
    for node in program.graph.nodes:
        name = str(node.target)
        if "avg_pool" in name:
            windows, axes = list(node.args[1]), node.meta["val"].dim() - 2
            total += math.prod(windows * axes if len(windows) == 1 else windows) * math.prod(sized(node))
        elif (
            any(kind in name for kind in ("batch_norm", "aten.mul", "aten.add"))
            and node.meta["val"].dim() > 2
        ):
            total += math.prod(sized(node))
    return total


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_networks_of_the_papers(name: str, decomposed: bool) -> None:
    """One convolution a group and no norm left, also when the graph was decomposed beforehand."""
    make, expected = NETWORKS[name]
    torch.manual_seed(0)
    network = randomised(make()).double()
    x, y = torch.randn(2, 3, 33, 29, dtype=torch.float64), torch.randn(3, 3, 40, 31, dtype=torch.float64)
    source: Any = network
    if decomposed:
        size = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        source = torch.export.export(network, (x,), dynamic_shapes=(size,)).run_decompositions()
    program = fused(source, x)
    assert convolutions(program) == expected
    assert not {"aten.batch_norm", "aten.avg_pool2d"} & set(program.operators)
    assert error(program, network, x) < 1e-10
    assert error(program, network, y) < 1e-10
    assert not program.report.passes[-1].refused


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes(mode: str) -> None:
    """Small kernels must see the same pixels in a large kernel's padding."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.ReLU(),
        Sum(
            nn.Sequential(nn.Conv2d(3, 4, 5, padding=2, padding_mode=mode), nn.BatchNorm2d(4)),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode),
            nn.Conv2d(3, 4, 1),
        ),
    )
    randomised(network).double()
    x, y = torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(2, 3, 12, 7, dtype=torch.float64)
    program = fused(network, x)
    assert convolutions(program) == 1
    assert error(program, network, x) < 1e-10
    assert error(program, network, y) < 1e-10


def test_the_order_of_branches_does_not_matter() -> None:
    torch.manual_seed(0)
    parts = [conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1)]
    networks = [
        nn.Sequential(nn.ReLU(), Sum(*[parts[i] for i in order])) for order in ((0, 1, 2, 3), (3, 1, 0, 2))
    ]
    for network in networks:
        randomised(network).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    kernels = []
    for network in networks:
        folded = fold(fused(network, x))
        kernels += [w.source.load() for w in folded.weights.values() if len(w.source.shape) == 4]
    assert len(kernels) == 2
    assert torch.allclose(*kernels, atol=1e-12)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.conv(torch.relu(x))


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        branch = self.one(x)
        return branch + self.two(x), branch


class InTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.batch_norm(self.one(x), None, None, training=True)
        return y + self.two(x)


def relu(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *parts)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "a norm before zero padding": (
        relu(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), "adds a constant before zero padding"),
    "a biased 1x1 before zero padding": (
        relu(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 3, padding=1)), "adds a constant before zero padding"),
    "two kernels with padding between": (
        relu(nn.Conv2d(4, 1, 3, padding=1, bias=False), nn.Conv2d(1, 4, 3, padding=1)), "between two kernels"),
    "a pool that counts no padding": (
        relu(Sum(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(4, 4, 3, padding=1))),
        "count_include_pad=False"),
    "a pool that may cut its last window": (
        relu(Sum(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 4, 2, 2))), "ceil_mode"),
    "different padding modes": (
        relu(Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))),
        "padded differently"),
    "different strides": (
        relu(Sum(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Sequential(nn.Conv2d(4, 4, 8, padding=0)))),
        "different strides"),
    "statistics of the batch": (relu(InTraining()), "training mode"),
    "a kernel used twice": (Shared(), "is shared with"),
    "a branch read elsewhere": (ReadElsewhere(), "is read by"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name: str) -> None:
    network, reason = REFUSED[name]
    randomised(network)
    size = 14 if name == "different strides" else 8
    x = torch.randn(2, 4, size, size)
    program = graphopt.capture(network, x, dynamic=None)
    with pytest.raises(PassRefusedError, match=reason) as refused:
        graphopt.optimize(program, "fuse-branches")
    assert ".py:" in str(refused.value) or "self._conv_forward" in str(refused.value), (
        "nor where in the model"
    )


def test_nothing_grows_unless_asked() -> None:
    """Depthwise and pointwise as one dense kernel costs more, so it is left; a pointwise sum beside it is not."""
    network = relu(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1))
    x = torch.randn(1, 8, 6, 6)
    with pytest.raises(PassRefusedError, match="matched nothing"):
        fused(network, x, "fuse-branches")
    assert convolutions(fused(network, x, "fuse-branches{allow_growth=true}")) == 1


def test_a_plan_can_leave_groups_out() -> None:
    torch.manual_seed(0)
    network = randomised(NETWORKS["repvgg"][0]())
    x = torch.randn(1, 3, 32, 32)
    program = graphopt.capture(network, x)
    from graphopt.measure.context import Context

    plan = FuseBranches().plan(program, Context())
    assert len(plan.sites) == 4
    del plan.sites[1]
    partly = graphopt.optimize(program, FuseBranches(), plan=[plan])
    assert convolutions(partly) == 3 + 2
    assert torch.allclose(partly(x), network(x), atol=1e-4)


def test_what_is_fused_leaves_by_every_exit(tmp_path: Any) -> None:
    import numpy
    import onnxruntime

    torch.manual_seed(0)
    network = randomised(NETWORKS["mobileone"][0]())
    x = torch.randn(2, 3, 32, 32)
    program = fused(network, x)
    with torch.no_grad():
        expected = network(x)
    program.save(tmp_path / "saved")
    assert torch.allclose(graphopt.load(tmp_path / "saved")(x), expected, atol=1e-4)
    assert torch.allclose(program.module()(x), expected, atol=1e-4)
    program.lower("onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert numpy.allclose(found, expected.numpy(), atol=1e-3)
    import onnx

    kinds = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("Conv") == 6
    assert set(kinds) <= {"Conv", "Relu"}, "something of the branches is left in the file"
