"""Operators computed by one kernel, and outputs of which the largest entries stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.decoding.drafters.multi_token_heads import MultiTokenHeads
from graphopt.ir.errors import PassRefusedError
from graphopt.ir.program import Program

SHAPES = st.builds(
    Shape,
    layers=st.integers(1, 3),
    norm=st.sampled_from(["rms", "written_rms", "layer"]),
    placement=st.sampled_from(["pre", "post", "sandwich", "parallel"]),
    gated=st.booleans(),
    bias=st.booleans(),
)


@given(SHAPES, st.integers(0, 2**20))
@settings(max_examples=6, deadline=None)
def test_joining_keeps_the_function(shape: Shape, seed: int) -> None:
    torch.manual_seed(seed)
    program = graphopt.capture(Transformer(shape), tokens(3, 13))
    done = graphopt.optimize(program, "fuse-kernels{allow_no_match=true}")
    for batch, length in ((2, 5), (1, 1)):
        given_ = tokens(batch, length)
        assert torch.allclose(done(**given_)["logits"], program(**given_)["logits"], rtol=1e-10, atol=1e-10)
    counted = done.operators
    if shape.gated:
        assert counted["graphopt.gated_product"] == shape.layers, "a gate was missed"
    if shape.norm != "layer" and shape.placement == "pre":
        assert counted["graphopt.add_rms_norm"] == 2 * shape.layers, "a norm of a sum was missed"


class Odd(nn.Module):
    """Sums and products that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
        twice = x + y
        active = F.silu(x)
        return [
            self.norm(x + row),
            self.norm(torch.add(x, y, alpha=2)),
            self.norm(twice),
            self.other(twice),
            active * y,
            active + 1,
            F.silu(y) * row,
        ]


def test_what_only_looks_alike_stays_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, row = (torch.randn(s, generator=generator) for s in ((3, 5, 8), (3, 5, 8), (8,)))
    program = graphopt.capture(Odd().eval(), (x, y, row))
    done = graphopt.optimize(program, "fuse-kernels")
    reasons = " / ".join(r.reason for r in done.report.passes[-1].refused)
    for part in ("another shape", "scaled", "another norm of the same sum", "read elsewhere", "other shapes"):
        assert part in reasons, f"nothing was said of what is {part}"
    assert done.operators["graphopt.add_rms_norm"] == 1
    assert done.operators["graphopt.gated_product"] == 0
    for a, b in zip(done(x, y, row), program(x, y, row), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_largest_entries_take_the_place_of_all(captured: Callable[[str], Program]) -> None:
    heads = graphopt.optimize(captured("llama"), "attach-multi-token-heads{heads=2}")
    ids = {"input_ids": torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(3))}
    expected = heads(**ids)
    done = graphopt.optimize(heads, "take-top-k{k=5}")
    found = done(**ids)
    assert list(found) == ["logits", "multi_token_logits_values", "multi_token_logits_tokens"]
    best = expected["multi_token_logits"].topk(5, -1)
    assert torch.allclose(found["multi_token_logits_values"], best.values, atol=1e-6)
    gathered = expected["multi_token_logits"].gather(-1, found["multi_token_logits_tokens"])
    assert torch.allclose(gathered, best.values, atol=1e-6), "values and numbers do not belong together"
    assert torch.equal(found["logits"], expected["logits"])
    # a capped head is no linear any more
    capped = graphopt.optimize(captured("gemma2"), "take-top-k{output=logits k=3}")
    assert capped.operators["aten.topk"] == 1
    with pytest.raises(PassRefusedError, match="no such output"):
        graphopt.optimize(captured("llama"), "take-top-k")
    with pytest.raises(PassRefusedError, match="fewer than k=1000"):
        graphopt.optimize(heads, "take-top-k{k=1000}")


def test_heads_that_give_their_best_tokens_draft_as_before(captured: Callable[[str], Program]) -> None:
    llama = captured("llama")
    rows = [[5, 6, 7, 8], [9, 4]]
    heads = graphopt.optimize(llama, "insert-cache, attach-multi-token-heads{heads=3}")
    few = graphopt.optimize(heads, "take-top-k{k=4}")

    def written(program: Program, nodes: int) -> tuple[list[list[int]], list[int], list[str]]:
        found = graphopt.stream(
            program, rows, max_new_tokens=10, eos_token_id=None, strategy=MultiTokenHeads(nodes)
        )
        for _ in found:
            pass
        return found.rows, found.statistics.proposed, found.statistics.notes

    expected = written(heads, 6)
    assert sum(expected[1]) > 0
    assert not expected[2]
    assert written(few, 6) == expected
    with pytest.raises(graphopt.UsageError, match="the program gives 1"):
        written(graphopt.optimize(heads, "take-top-k{k=1}"), 12)
