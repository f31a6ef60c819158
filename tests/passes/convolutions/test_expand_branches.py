"""expand-branches: nothing changes at first, everything trains, one convolution comes back; and equalisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from amounts import examples
from branch_networks import NETWORKS, randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import PassRefusedError, PipelineError
from graphopt.ir.running.fold import fold
from graphopt.passes import ExpandBranches
from graphopt.passes.convolutions.quantisation import ranges

D = torch.float64


class CausalNet(nn.Module):
    def __init__(self, kernel: int, dilation: int, groups: int):
        super().__init__()
        self.reach = (kernel - 1) * dilation
        self.conv = nn.Conv1d(4, 4, kernel, dilation=dilation, groups=groups)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(F.pad(x, (self.reach, 0)))))


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    kernel = draw(st.sampled_from([2, 3, 5]))
    dilation = draw(st.sampled_from([1, 2]))
    if draw(st.booleans()):
        network: nn.Module = CausalNet(kernel, dilation, draw(st.sampled_from([1, 2, 4])))
        x = torch.randn(2, 4, draw(st.integers(9, 15)), dtype=D)
    else:
        padding = draw(st.integers(0, 2))
        stride = draw(st.sampled_from([1, 2]))
        network = nn.Sequential(
            nn.Conv2d(4, 4, kernel, stride, padding, dilation), nn.BatchNorm2d(4), nn.ReLU()
        )
        x = torch.randn(2, 4, 13, draw(st.integers(12, 15)), dtype=D)
    return randomised(network).double(), x


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    networks(),
    st.lists(st.sampled_from([1, 2, 3]), max_size=3),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from(["auto", "last", "centre"]),
)
def test_expanded_trained_fused(
    made: tuple[nn.Module, torch.Tensor], kernels: list[int], copies: int, identity: bool, align: str
) -> None:
    """Wrong if new branches add anything, if fusing them needs a larger kernel, or gives other values."""
    network, x = made
    if not (kernels or copies or identity):
        return
    lie = {"align": align} if kernels or identity else {}
    step = ExpandBranches(kernels=kernels, copies=copies, identity=identity, allow_no_match=True, **lie)
    program = graphopt.optimize(network, step, inputs=x)
    with torch.no_grad():
        assert torch.equal(program(x), network(x)), "new branches are not silent"
    for weight in program.weights.values():  # as training could leave them
        if ".branches." in weight.name:
            tensor = weight.source.load()
            tensor.copy_(torch.randn(tensor.shape, dtype=D))
    program.changed()
    fused = graphopt.optimize(program, "fuse-branches{allow_no_match=true}")
    expected = program(x)
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    convolutions = [n for n in fused.graph.nodes if "aten.conv" in str(n.target)]
    assert len(convolutions) == 1
    original = next(p for n, p in network.named_parameters() if p.dim() > 2)
    assert list(convolutions[0].args[1].meta["val"].shape) == list(original.shape), "the deployed kernel grew"


def test_all_branches_train() -> None:
    """Scales learn at once, new kernels as soon as the scales are not zero; the original goes on learning."""
    torch.manual_seed(0)
    network = randomised(CausalNet(5, 1, 1))
    x = torch.randn(8, 4, 20)
    program = graphopt.optimize(network, "expand-branches{copies=1 kernels=[3 1]}", inputs=x)
    module = program.module()
    parameters = dict(module.named_parameters())
    assert {"conv.weight", "conv.branches.0.weight", "conv.branches.0.scale", "conv.branches.3.scale"} <= set(
        parameters
    )
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in parameters.items() if n.startswith("conv"))
    assert all(
        torch.equal(before_network, p)
        for before_network, p in zip([before["conv.weight"]], [network.conv.weight], strict=True)
    ), "the user's model was trained"


def test_smaller_kernels_of_causal_convolutions_see_the_latest_frames() -> None:
    network = randomised(CausalNet(5, 1, 1))
    program = graphopt.capture(network, torch.randn(2, 4, 12))
    from graphopt.measure.context import Context

    plan = ExpandBranches(kernels=[3]).plan(program, Context())
    assert plan.sites[0]["align"] == "last"
    square = graphopt.capture(nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 8, 8))
    assert ExpandBranches().plan(square, Context()).sites[0]["align"] == "centre"


def test_what_cannot_be_expanded_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.conv(x)))

    with pytest.raises(PassRefusedError, match="is shared with"):
        graphopt.optimize(Twice(), "expand-branches", inputs=torch.randn(1, 4, 8))
    with pytest.raises(PassRefusedError, match="matched nothing"):
        graphopt.optimize(nn.Linear(3, 3), "expand-branches", inputs=torch.randn(2, 3))
    for wrong in ("kernels=[0]", "copies=0 kernels=[] identity=false", "copies=-1", "align=first"):
        with pytest.raises(PipelineError):
            graphopt.optimize(nn.Linear(3, 3), f"expand-branches{{{wrong}}}", inputs=torch.randn(2, 3))


@pytest.mark.parametrize("name", ["mobileone", "repvgg"])
def test_equalisation_changes_ranges_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    network = randomised(NETWORKS[name][0]()).double()
    x, y = torch.randn(2, 3, 32, 32, dtype=D), torch.randn(1, 3, 41, 35, dtype=D)
    plain = graphopt.optimize(network, "fuse-branches", inputs=x)
    even = graphopt.optimize(network, "fuse-branches{equalize=true}", inputs=x)
    with torch.no_grad():
        for z in (x, y):
            assert torch.allclose(even(z), network(z), rtol=0, atol=1e-10 * float(network(z).abs().max()))

    def noise(program: graphopt.Program) -> list[float]:
        kernels = [w.source.load() for w in fold(program).weights.values() if len(w.source.shape) == 4]
        return [ranges(kernel).per_tensor for kernel in kernels]

    assert sum(noise(even)) > sum(noise(plain)) + 10, "ranges are as far apart as before"
    assert any("signal-to-noise" in note for note in even.report.passes[-1].notes)


def test_ranges_of_a_kernel() -> None:
    """A kernel with one channel a thousand times larger: no step for all serves the others."""
    kernel: Any = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    even = ranges(kernel)
    kernel[0] *= 1000
    found = ranges(kernel)
    assert even.per_tensor == pytest.approx(even.per_channel, abs=1)
    assert found.per_channel == pytest.approx(even.per_channel, abs=0.5)
    assert found.per_tensor < even.per_tensor - 55
    assert found.spread > 900
