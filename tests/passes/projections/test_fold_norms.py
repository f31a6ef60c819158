"""Folding BatchNorm, and the weights of other norms, into the matrices beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_networks import CONVOLUTIONS, NORMS, D, draw, fold, randomise
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.measure.context import Context
from graphopt.passes import FoldNorms
from graphopt.passes.framework.manager import run_pipeline


def reasons(model: nn.Module, x: torch.Tensor, **options: Any) -> str:
    """Return the message of a refusal, after checking that the program is as it was."""
    program = graphopt.capture(model.to(D).eval(), x, compare=False)
    before = program.text()
    with pytest.raises(graphopt.PassRefusedError) as caught:
        run_pipeline(program, [FoldNorms(**options)], Context())
    assert program.text() == before
    return str(caught.value)


@settings(max_examples=examples(36), deadline=None)
@given(
    rank=st.sampled_from([1, 2, 3]), groups=st.sampled_from([1, 2, 4]), before=st.booleans(), bias=st.booleans(),
    affine=st.booleans(), padding=st.sampled_from([0, 1]), stride=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_take_the_norm_beside_them(
    rank: int, groups: int, before: bool, bias: bool, affine: bool, padding: int, stride: int, seed: int
) -> None:
    """Wrong if a group, a sign, a tiny variance or a padded border were folded as if it were not there."""
    channels = 8 if before else 4
    conv = CONVOLUTIONS[rank](4, 8, 3, stride=stride, padding=padding, groups=groups, bias=bias)
    norm = NORMS[rank](channels, affine=affine)
    model = randomise(nn.Sequential(*((conv, norm) if before else (norm, conv))).to(D), seed)
    x = draw(2, 4, *[7] * rank)
    if padding and not before:
        assert "pads with zeros" in reasons(model, x)
        return
    program, folded = fold(model, x)
    assert folded.operators[f"aten.conv{rank}d"] == 1
    assert folded.operators["aten.batch_norm"] == 0
    assert program.operators["aten.batch_norm"] == 1


@pytest.mark.parametrize("before", [True, False])
def test_linears_take_the_norm_beside_them(before: bool) -> None:
    """Wrong if the classifier at the end of a network kept a norm that costs a pass over memory."""
    linear, norm = nn.Linear(6, 5), nn.BatchNorm1d(5 if before else 6)
    model = randomise(nn.Sequential(*((linear, norm) if before else (norm, linear))).to(D))
    _, folded = fold(model, draw(3, 6))
    assert folded.operators["aten.batch_norm"] == 0


def test_a_depthwise_network_folds_entirely() -> None:
    """Wrong if a norm between two convolutions were folded into both, or into the wrong one."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        layers += [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    _, folded = fold(randomise(nn.Sequential(*layers).to(D), smallest=1e-4), draw(2, 4, 6, 6))
    assert folded.operators["aten.batch_norm"] == 0
    assert folded.operators["aten.conv2d"] == 6


class Net(nn.Module):
    """A convolution, a BatchNorm, and a function of both."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.conv.weight
        self.function = function
        randomise(self.to(D))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def _in_training(net: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(net.conv(x), None, None, net.norm.weight, net.norm.bias, training=True)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "training mode": (_in_training, "training mode"),
    "read by others": (lambda net, x: (h := net.conv(x), net.norm(h) + h)[1], "is read elsewhere as well"),
    "no neighbour": (lambda net, x: torch.relu(net.norm(torch.relu(x))), "has no matrix to absorb it"),
    "padding behind it": (lambda net, x: net.conv(net.norm(x)), "pads with zeros"),
    "a matrix that is tied": (
        lambda net, x: net.other(torch.relu(net.norm(net.conv(x)))), "is used elsewhere; untie=true",
    ),
    "a matrix from the input": (
        lambda net, x: net.norm(F.conv2d(x, net.conv.weight * x.mean())), "depends on the input",
    ),
    "read as it is as well": (
        lambda net, x: (h := net.norm(torch.relu(x)), F.conv2d(h, net.conv.weight), h.sum())[1:], "has no matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_batch_norms_that_cannot_be_folded(name: str) -> None:
    """Wrong if statistics of a batch, another reader or a border were folded away."""
    function, reason = REFUSED[name]
    assert reason in reasons(Net(function), draw(2, 4, 6, 6), which="batch-norm")


def test_without_statistics_a_batch_norm_stays() -> None:
    """Wrong if a norm that always uses the batch's own statistics were taken for a constant."""
    model = Net(lambda net, x: net.norm(net.conv(x)), track_running_stats=False)
    assert "training mode" in reasons(model, draw(2, 4, 6, 6))


def test_untied_matrices_are_copies() -> None:
    """Wrong if folding one use of a shared matrix changed the other."""
    model = Net(lambda net, x: net.other(torch.relu(net.norm(net.conv(x)))))
    program, folded = fold(model, draw(2, 4, 6, 6), untie=True)
    assert folded.operators["aten.batch_norm"] == 0
    assert len(program.weights) >= len(folded.weights)


def test_the_model_and_its_statistics_stay_as_they_were() -> None:
    """Wrong if folding wrote to tensors that the user's model still uses."""
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to(D))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    fold(model, draw(2, 4, 6, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, held[name]), name


@pytest.mark.parametrize("which", ["layer-norm", "rms-norm", "batch-norm"])
def test_only_the_norms_asked_for(which: str) -> None:
    """Wrong if ``which`` were ignored."""

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch, self.layer, self.rms = nn.BatchNorm1d(6), nn.LayerNorm(6), nn.RMSNorm(6)
            self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm, linear in zip((self.batch, self.layer, self.rms), self.linears, strict=True):
                x = torch.relu(linear(norm(x)))
            return x

    _, folded = fold(randomise(All().to(D)), draw(3, 6), which=which)
    assert folded.report is not None
    assert len(folded.report.passes[0].sites) == 1
    assert folded.operators["aten.batch_norm"] == (0 if which == "batch-norm" else 1)


def test_a_norm_with_weights_of_another_shape_is_refused() -> None:
    """Wrong if a norm over positions and channels were folded as if it were over channels."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm((5, 6)), nn.Linear(6, 4)
            self.norm.weight.data.normal_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x))

    assert "several dimensions" in reasons(Wide(), draw(2, 5, 6))


def test_a_norm_of_two_readers_is_folded_into_both() -> None:
    """Wrong if only the first of two matrices got the norm's weight, or a bias was added twice."""

    class Readers(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.first, self.second = nn.Linear(6, 4, bias=bias), nn.Linear(6, 4)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.first(h.reshape(-1, 6)).reshape(*h.shape[:-1], 4) * self.second(h)

    for bias in (True, False):
        program, folded = fold(Readers(bias), draw(2, 5, 6))
        assert folded.operators["aten.linear"] == program.operators["aten.linear"] == 2
        (norm,) = (n for n in folded.nodes if "layer_norm" in str(n.target))
        assert norm.args[2:4] in ((), (None, None))


def test_experts_whose_inputs_are_weighed_stay_that_way() -> None:
    """Llama 4 multiplies what experts read, not what they give; for experts that bend, the two differ."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4, pad_token_id=0,
        interleave_moe_layer_step=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
    ids = {"input_ids": torch.randint(3, 60, (2, 7))}
    program = graphopt.capture(model, ids)
    folded = graphopt.optimize(program, "fold-norms")
    assert not any(r.rolled_back for r in folded.report.passes[-1].refused)
    assert len(folded.report.passes[-1].sites) == 3
    assert [n.kwargs["weigh_inputs"] for n in folded.graph.nodes if "routed_ffn" in n.name] == [True]
    torch.testing.assert_close(folded(**ids), program(**ids), rtol=1e-4, atol=1e-5)
