"""Inputs that a program does not take: named in the message, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt
from graphopt import Program, UsageError

IDS = torch.arange(3, 13).reshape(2, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing input input_ids"),
        ((IDS,), {"input_ids": IDS}, "given twice"),
        ((IDS, IDS, IDS, IDS), {}, "4 inputs given"),
        ((IDS,), {"inputs_embeds": IDS}, "takes no input 'inputs_embeds'"),
        ((IDS.int(),), {}, "int32.*int64"),
        ((IDS.float(),), {}, "float32.*int64"),
        ((IDS, torch.ones(2, 5)), {}, "'attention_mask' is torch.float32"),
        ((IDS, torch.ones(2, 5, dtype=torch.bool)), {}, "'attention_mask' is torch.bool"),
        ((IDS[0],), {}, "1 dimensions"),
        ((IDS, torch.ones(2, 6, dtype=torch.long)), {}, "sequence is 6 in 'attention_mask' and 5"),
        ((IDS, torch.ones(3, 5, dtype=torch.long)), {}, "batch is 3 in 'attention_mask' and 2"),
        ((IDS[:0],), {}, "batch is 0"),
        ((IDS[:, :0],), {}, "sequence is 0"),
        (([[7, 7]],), {}, "must be a tensor, not list"),
        ((None,), {}, "missing input input_ids"),
    ],
)
def test_wrong_inputs_are_named(
    args: Any, kwargs: Any, message: str, captured: Callable[[str], Program]
) -> None:
    with pytest.raises(UsageError, match=message):
        captured("llama")(*args, **kwargs)


def test_a_size_beyond_the_table_of_positions_is_refused(captured: Callable[[str], Program]) -> None:
    program = captured("bert")
    assert program(torch.full((1, 64), 7)).last_hidden_state.shape == (1, 64, 32)
    with pytest.raises(UsageError, match=r"sequence is 65.*up to 64"):
        program(torch.full((1, 65), 7))


def test_a_size_computed_from_another_is_checked() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x]) + y

    program = graphopt.capture(Doubled(), {"x": torch.randn(4, 5), "y": torch.randn(8, 5)})
    assert program(x=torch.randn(3, 5), y=torch.randn(6, 5)).shape == (6, 5)
    with pytest.raises(UsageError, match=r"must be .*= 6"):
        program(x=torch.randn(3, 5), y=torch.randn(7, 5))


def test_packed_sequences_without_a_mask_are_refused(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    packed = torch.tensor([[0, 1, 2, 0, 1]]).repeat(2, 1)
    with pytest.raises(UsageError, match="packs several sequences"):
        program(IDS, position_ids=packed)
    plain = program(IDS, position_ids=torch.arange(5).repeat(2, 1)).logits
    assert torch.equal(plain, program(IDS).logits), "positions filled in are not those of one sequence"
    with_mask = program(IDS, torch.ones_like(IDS), packed).logits
    assert not torch.allclose(with_mask, plain), "positions that are given have no effect"
    shifted = program(IDS, position_ids=torch.arange(3, 8).repeat(2, 1)).logits
    assert torch.allclose(shifted, plain, atol=1e-5), "rotary positions are relative: a shift changes nothing"
