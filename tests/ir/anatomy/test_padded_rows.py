"""Which rows count: those of real tokens; what padding computes is a number that nothing else reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo

from graphopt.ir.program import Program
from graphopt.ir.schema import arguments, is_operator

IDS = torch.tensor([[5, 9, 17, 40, 3, 8], [12, 7, 30, 21, 44, 6], [9, 9, 4, 31, 5, 2]])
MASKS = {
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "a row of padding": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt_oss", "bert", "mpnet"])
def test_real_tokens_are_as_in_the_model(name: str, side: str, captured: Callable[[str], Program]) -> None:
    """Whatever padding there is; no position of padding, seen by none, is NaN, which sums over rows would spread."""
    program, mask = captured(name), torch.tensor(MASKS[side])
    model = zoo.make(name).eval()
    with torch.no_grad():
        expected = next(iter(model(input_ids=IDS, attention_mask=mask).values()))
    found = next(iter(program(input_ids=IDS, attention_mask=mask).values()))
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)
    assert torch.isfinite(found).all()
    other = torch.where(mask.bool(), IDS, 50)
    again = next(iter(program(input_ids=other, attention_mask=mask).values()))
    # experts compute the tokens that chose them together, so that sums may be rounded in another order
    assert torch.allclose(again[mask.bool()], found[mask.bool()], atol=1e-6), "padding is read by real tokens"


def test_a_query_that_sees_nothing_yields_zeros() -> None:
    """By every form of attention: fused, with a soft cap, with sinks, over grouped heads, with a cache's mask."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    hidden = torch.tensor([[True] * 5, [False] * 5])
    for options in ({}, {"softcap": 3.0}, {"sinks": torch.zeros(4)}, {"bias": torch.zeros(1, 1, 3, 5)}):
        found = torch.ops.graphopt.attention(q, k, k, key_mask=hidden, scale=0.3, **options)
        assert (found[1] == 0).all() and (found[0] != 0).any(), options
        visible = hidden[:, None, None].expand(2, 1, 3, 5)
        assert torch.equal(
            torch.ops.graphopt.attention(q, k, k, visible=visible, scale=0.3, **options)[1], found[1]
        )


def test_padding_is_told_from_other_masks(captured: Callable[[str], Program]) -> None:
    """What is hidden by padding is known as that, so that a cache may leave it out."""
    cores = [n for n in captured("llama").nodes if is_operator(n, "graphopt.attention")]
    assert cores and all(arguments(n)["key_mask"] is not None and arguments(n)["bias"] is None for n in cores)
