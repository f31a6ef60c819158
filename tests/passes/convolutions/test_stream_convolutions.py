"""stream-convolutions: pieces of any size give what the whole gives, and what cannot be cut is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
import torch
from amounts import examples
from branch_networks import randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import ContractError, PassRefusedError, UsageError
from graphopt.ir.checking.streaming import initial_state, stream

sys.path.insert(0, str(ROOT / "examples" / "reference_models"))
D = torch.float64


class Layer(nn.Module):
    """A causal layer in one of the spellings that models use."""

    def __init__(self, channels: int, kernel: int, dilation: int, groups: int, spelling: str, residual: bool):
        super().__init__()
        self.reach, self.spelling, self.residual = (kernel - 1) * dilation, spelling, residual
        padding = self.reach if spelling == "cut" else 0
        self.conv = nn.Conv1d(channels, channels, kernel, 1, padding, dilation, groups)
        self.norm = nn.BatchNorm1d(channels)
        self.pool = nn.AvgPool1d(kernel, 1)
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "cut":
            y = self.conv(x)[:, :, : -self.reach] if self.reach else self.conv(x)
        else:
            y = self.conv(F.pad(x, (self.reach, 0)))
        if self.spelling == "pool":
            y = y + self.pool(F.pad(x, (self.kernel - 1, 0)))
        y = torch.relu(self.norm(y))
        return x + y if self.residual else y


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        layers.append(
            Layer(
                4,
                draw(st.sampled_from([1, 2, 3, 5])),
                draw(st.sampled_from([1, 2, 3])),
                draw(st.sampled_from([1, 2, 4])),
                draw(st.sampled_from(["pad", "cut", "pool"])),
                draw(st.booleans()),
            )
        )
    layers.append(nn.Conv1d(4, 3, 1))
    return randomised(nn.Sequential(*layers), draw(st.integers(0, 99))).double()


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3), st.booleans())
def test_pieces_of_any_size_give_what_the_whole_gives(
    network: nn.Module, sizes: list[int], batch: int, fuse: bool
) -> None:
    """Wrong if a state is too short, of another layer, late by a frame, or mixed between streams."""
    x = torch.randn(batch, 4, sum(sizes), dtype=D, generator=torch.Generator().manual_seed(1))
    program = graphopt.capture(network, torch.randn(2, 4, 30, dtype=D))
    steps = "fuse-branches{allow_no_match=true}, " if fuse else ""
    streaming = graphopt.optimize(program, steps + "stream-convolutions{allow_no_match=true}")
    past = any(layer.kernel > 1 for layer in network[:-1])  # type: ignore[index, union-attr]
    assert bool(initial_state(streaming)) == past, "a state for nothing, or none where there is a past"
    with torch.no_grad():
        expected = network(x)
    found = torch.cat(list(stream(streaming, x.split(sizes, -1))), -1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


class Ahead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class MeanOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.pad(x, (2, 0)))
        return y - y.mean(2, keepdim=True)


class Reflected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (2, 0), mode="replicate"))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (2, 0))).mean(2)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Ahead(), "reads 2 frames ahead"),
        (MeanOverTime(), "sub: its values depend on frames outside the piece"),
        (Last(), "its values depend on frames outside the piece"),
        (Reflected(), "padded by replicate"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, stride=2, padding=1)), "stride along time"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), "reads 2 frames ahead"),
    ],
)
def test_what_does_not_stream_is_refused(network: nn.Module, reason: str) -> None:
    with pytest.raises(PassRefusedError, match=reason):
        graphopt.optimize(network.eval(), "stream-convolutions", inputs=torch.randn(2, 4, 20))


def test_a_state_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract must see what the trial could not: here the pass itself is made to be a frame late."""
    from graphopt.passes.convolutions import stream_convolutions as module

    original = module.StreamConvolutions.rewrite

    def late(self: object, program: graphopt.Program, plan: object) -> None:
        original(self, program, plan)  # type: ignore[arg-type]
        for node in program.graph.nodes:
            if "aten.slice" in str(node.target) and node.args[2:3] == (-2,):
                node.args = (*node.args[:2], -3, -1)

    monkeypatch.setattr(module.StreamConvolutions, "_trial", lambda *a: None)
    monkeypatch.setattr(module.StreamConvolutions, "rewrite", late)
    network = nn.Sequential(Layer(4, 3, 1, 1, "pad", False)).eval()
    with pytest.raises(ContractError, match="of pieces differs"):
        graphopt.optimize(network, "stream-convolutions", inputs=torch.randn(2, 4, 20))


def test_states_are_asked_for_and_begin_with_zeros() -> None:
    network = nn.Sequential(Layer(4, 3, 2, 1, "pad", False)).eval()
    program = graphopt.optimize(network, "stream-convolutions", inputs=torch.randn(2, 4, 20))
    assert {n: tuple(t.shape) for n, t in initial_state(program, 5).items()} == {"state_0": (5, 4, 4)}
    with pytest.raises(UsageError, match="missing input state_0"):
        program(torch.randn(1, 4, 3))
    with pytest.raises(UsageError, match="no recurrent state"):
        initial_state(graphopt.capture(network, torch.randn(2, 4, 20)))
    with pytest.raises(graphopt.PipelineError, match="streaming"):
        graphopt.optimize(program, "stream-convolutions")


def test_streaming_leaves_as_onnx_with_fixed_states(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = randomised(nn.Sequential(Layer(4, 5, 2, 4, "pad", True), Layer(4, 3, 1, 1, "cut", False)))
    program = graphopt.optimize(network, "fuse-branches, stream-convolutions", inputs=torch.randn(2, 4, 30))
    program.save(tmp_path / "saved")
    loaded = graphopt.load(tmp_path / "saved")
    loaded.lower("onnx", tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    states = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("state")}
    assert all(isinstance(s, int) for shape in states.values() for s in shape[1:]), states
    x = torch.randn(1, 4, 11)
    state = {n: t.numpy() for n, t in initial_state(loaded, 1).items()}
    name = next(i.name for i in session.get_inputs() if not i.name.startswith("state"))
    outputs, parts = [o.name for o in session.get_outputs()], []
    for piece in x.split([1, 4, 1, 5], -1):
        values = dict(zip(outputs, session.run(None, {name: piece.numpy(), **state}), strict=True))
        state = {n: values.pop(f"next_{n}") for n in state}
        parts.append(next(iter(values.values())))
    assert numpy.allclose(numpy.concatenate(parts, -1), network(x).detach().numpy(), atol=1e-4)
