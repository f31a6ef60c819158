"""Faults planted in canonicalisation: the comparison with the model catches each before a program counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import D, Shape, Transformer, tokens
from spelled_networks import Chain, Function, draw
from torch import fx, nn

import graphopt
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.canonical import attention, experts, linears, norms, rotary
from graphopt.ir.rewriting import cleanup
from graphopt.ir.rewriting import functionalise as functional

ORIGINAL: dict[str, Any] = {
    "split_mask": attention.split_mask,
    "peel": attention.peel,
    "ungrouped": attention.ungrouped,
    "_following": norms._following,
    "_recognise": rotary._recognise,
    "activation_of_experts": experts.activation_of_experts,
    "_vector": norms._vector,
    "_frozen": cleanup._frozen,
    "recognise_linears": linears.recognise_linears,
}
aten = torch.ops.aten


def meaning_with(**changes: Any) -> Callable[..., Any]:
    def split(program: Any, mask: Any) -> Any:
        meaning, rest = ORIGINAL["split_mask"](program, mask)
        return (meaning if meaning is None else replace(meaning, **changes)), rest

    return split


def _scale_lost(program: Any, softmax: Any) -> Any:
    scores = ORIGINAL["peel"](program, softmax)
    return scores if isinstance(scores, str) else replace(scores, scale=1.0)


def _biases_lost(program: Any, softmax: Any) -> Any:
    scores = ORIGINAL["peel"](program, softmax)
    return scores if isinstance(scores, str) else replace(scores, added=scores.added[:-1])


def _tiles_for_groups(value: fx.Node) -> tuple[fx.Node, int]:
    source, times = ORIGINAL["ungrouped"](value)
    if times == 1:
        return source, times
    # the heads of a group next to each other, taken in turns
    with value.graph.inserting_after(source):
        rolled = value.graph.call_function(aten.roll.default, (source, [1], [1]))
    rolled.meta["val"] = source.meta["val"]
    return rolled, times


def _weight_lost(program: Any, core: Any, x: Any, centred: bool) -> Any:
    result, _, bias, before = ORIGINAL["_following"](program, core, x, centred)
    return result, None, bias, before


def _other_pairs(program: Any, match: Any, interleaved: bool) -> None:
    ORIGINAL["_recognise"](program, match, not interleaved)


def _another_activation(source: Any, target: Any) -> Any:
    found = ORIGINAL["activation_of_experts"](source, target)
    return found if found is None else {**found, "activation": "gelu"}


def _numbers_alike(value: Any) -> Any:
    return "number" if isinstance(value, (int, float)) else ORIGINAL["_frozen"](value)


def _transposed(program: Any) -> None:
    ORIGINAL["recognise_linears"](program)
    node = next(n for n in program.nodes if n.target is aten.linear.default and n.args[1].op == "placeholder")
    with program.edit.before(node):
        node.update_arg(1, program.edit.call(aten.permute.default, node.args[1], [1, 0]))


def _into_slices(p: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape)
    out[..., :4] = x[..., 4:]
    return out @ p.w


def _powers(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x.pow(2) * p.v + x.pow(3)


def _rounded(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).to(D) * p.v


SHAPE = Shape(layers=1)
TOKENS = tokens(2, 9)
CAUSAL = "the window and causality of a mask"


def transformer(**options: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Transformer(replace(SHAPE, **options)), TOKENS


def chain(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Chain([name]), {"x": draw(2, 5)}


def function(body: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Function(body), {"x": draw(2, 5)}


FAULTS: dict[str, tuple[Callable[[], Any], Any, str, Any]] = {
    "a write in place lost": (
        lambda: function(_into_slices), functional, "put_back", lambda program, whole, chain, value: whole,
    ),
    "padding ignored": (transformer, attention, "split_mask", meaning_with(key_mask=None)),
    "causality lost": (transformer, attention, "split_mask", meaning_with(causal=False)),
    "a window that is not there": (transformer, attention, "split_mask", meaning_with(window=8)),
    "the scale lost": (transformer, attention, "peel", _scale_lost),
    "a mask lost": (transformer, attention, "peel", _biases_lost),
    "heads grouped in another order": (transformer, attention, "ungrouped", _tiles_for_groups),
    "a norm's weight lost": (lambda: chain("rms_written_out"), norms, "_following", _weight_lost),
    "a norm's offset lost": (
        lambda: chain("layer_norm_written_out"), norms, "_vector", lambda program, weight, size: None,
    ),
    "rotation of other pairs": (lambda: chain("rotary_in_halves"), rotary, "_recognise", _other_pairs),
    "another activation of experts": (lambda: chain("mixture"), experts, "activation_of_experts", _another_activation),
    "unequal calls taken for equal": (lambda: function(_powers), cleanup, "_frozen", _numbers_alike),
    "a matrix transposed": (
        lambda: chain("matmul_transposed"), graphopt.ir.canonical, "recognise_linears", _transposed,
    ),
    "a rounding dropped": (lambda: function(_rounded), cleanup, "same_value", lambda first, second: True),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_rule_is_caught_by_comparing_with_the_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if a graph that computes something else than the model could be used as the model."""
    make, module, attribute, wrong = FAULTS[name]
    model, inputs = make()
    capture_module(model, inputs)
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises((graphopt.CaptureError, graphopt.VerificationError)) as caught:
        capture_module(model, inputs)
    if isinstance(caught.value, graphopt.CaptureError):
        assert "differs from the model on" in str(caught.value)


def test_a_branch_that_the_example_does_not_show_is_caught() -> None:
    """Wrong if a model that acts otherwise at another length were captured from one length alone."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8, dtype=D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * (2.0 if x.shape[1] > 6 else 1.0)

    try:
        program = capture_module(Branch(), draw(2, 5))
    except graphopt.CaptureError:
        return
    limits = program.signature.sizes["sequence"]
    assert limits.high is not None
    assert limits.high <= 6, "the size that the example chose is not the program's limit"
