"""Budgets by layer: they sum up exactly, and more goes to layers whose keys follow from what stands far away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoding import VOCABULARY
from test_policies import GROUPS, PLACES, Grouped
from torch.nn import functional as F

import graphopt
from graphopt.decoding import layer_budgets, layer_sensitivity
from graphopt.decoding.generation import with_cache
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program


@pytest.fixture(scope="module")
def grouped() -> tuple[Grouped, Program]:
    module = Grouped(7).double().eval()
    return module, with_cache(graphopt.capture(module, {"input_ids": torch.randint(0, VOCABULARY, (2, 6))}))


@given(
    found=st.lists(st.floats(0, 2), min_size=1, max_size=40), budget=st.integers(1, 5000),
    exponent=st.floats(0, 4), floor=st.floats(0, 1),
)  # fmt: skip
def test_budgets_sum_up_and_follow_sensitivity(
    found: list[float], budget: int, exponent: float, floor: float
) -> None:
    budgets = layer_budgets(found, budget, exponent, floor)
    assert sum(budgets) == budget * len(found)
    assert min(budgets) >= int(budget * floor)
    for a, one in zip(found, budgets, strict=True):
        for b, other in zip(found, budgets, strict=True):
            assert one <= other or a >= b or one - other <= 1
    if exponent == 0 or floor == 1 or len(set(found)) == 1:
        assert max(budgets) - min(budgets) <= 1


def test_keys_are_those_of_tokens_that_see_less(grouped: tuple[Grouped, Program]) -> None:
    """Beside the module itself with the mask of blocks."""
    module, program = grouped
    text = [(t * t + t) % VOCABULARY for t in range(40)]
    found = layer_sensitivity(program, [text], block=8, sinks=2)
    sees = [[s <= t and (s < 2 or s >= t // 8 * 8 - 4) for s in range(40)] for t in range(40)]
    keys: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for mask in (torch.ones(40, 40).tril().bool(), torch.tensor(sees)):
            x = module.embed(torch.tensor([text])) + module.places(torch.arange(40))
            keys.append([])
            for layer in range(2):
                q, k, v = module.projected(layer, x)
                keys[-1].append(k[0])
                k, v = (t.repeat_interleave(q.shape[1] // GROUPS, 1) for t in (k, v))
                x = module.after(layer, x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    expected = [
        1 - float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()) for a, b in zip(*keys, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[0] <= 1e-12 < 1e-6 < found[1]


@pytest.mark.parametrize("model", ["gemma3", "deepseek_v3", "lfm2"])
def test_ordinary_models_are_measured(model: str, captured: Callable[[str], Program]) -> None:
    program = with_cache(captured(model))
    found = layer_sensitivity(program, [[(3 * t + t * t) % 90 + 5 for t in range(60)]], block=8)
    budgets = layer_budgets(found, 16)
    text = ", ".join(map(str, budgets)).replace(",", "")
    rows = [list(range(5, 20))]
    written = [
        graphopt.generate(program, rows, max_new_tokens=8, cache=cache, eos_token_id=None).tolist()
        for cache in (f"window{{budget=[{text}] sinks=1 block=4}}", "full")
    ]
    assert len(written[0][0]) == len(written[1][0]) == 23


def test_what_cannot_be_measured(grouped: tuple[Grouped, Program]) -> None:
    program = grouped[1]
    for rows, reason in (
        ([], "no text"),
        ([[1] * PLACES, [1] * 12], "text 1 has 12 tokens, of which each sees"),
    ):
        with pytest.raises(UsageError, match=reason):
            layer_sensitivity(program, rows, block=8)
    for options, reason in (
        ((0,), "budget is 0"), ((True,), "budget is True"), ((8, -1.0), "exponent is -1.0"), ((8, 1.1, 2.0), "floor is 2.0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            layer_budgets([0.1, 0.2], *options)
    for wrong in ([], [float("nan")], ["a"], [0.1, None], torch.tensor([0.1, 0.2])):
        with pytest.raises(UsageError, match="a list with a finite number for each layer"):
            layer_budgets(wrong, 8)
    long = [[1] * 40]
    for options, reason in (
        ({"block": 0}, "block is 0"), ({"block": 8.0}, "block is 8.0"), ({"sinks": -1}, "sinks is -1"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            layer_sensitivity(program, long, **options)
    for rows, reason in (
        ([[1] * (PLACES + 1)], f"text 0 has {PLACES + 1} tokens, the model has positions for"),
        ([[1] * 39 + [VOCABULARY]], f"text 0 has token {VOCABULARY}"), ([[-1] * 40], "text 0 has token -1"),
        ([1, 2], "rows are lists of tokens"), (torch.ones(2, 40), "rows are lists of tokens"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            layer_sensitivity(program, rows, block=8)
    with pytest.raises(UsageError, match="caches in few bits are not measured"):
        layer_sensitivity(graphopt.optimize(program.copy(), "quantize-cache"), long, block=8)
