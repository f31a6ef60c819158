"""Prompts packed into lines: keys, values and outputs are those of each prompt alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.decoding import cached as cached_decoder
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.packing import packed
from graphopt.ir.program import Program
from graphopt.ir.running.retype import retyped

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@cache
def program_of(kind: str) -> Program:
    torch.manual_seed(0)
    config: Any = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "mamba2": lambda: transformers.Mamba2Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=16,
            state_size=8,
            n_groups=1,
        ),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    program = graphopt.capture(model, {"input_ids": torch.arange(9)[None]}, compare=False)
    return graphopt.optimize(retyped(program), "insert-cache{tree=true}")


@settings(max_examples=examples(12), deadline=None)
@given(
    st.lists(st.integers(1, 24), min_size=2, max_size=7),
    st.sampled_from(["llama", "gemma3"]),
    st.integers(0, 99),
)
def test_rows_are_those_of_prompts_alone(lengths: list[int], kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in lengths]
    program = program_of(kind)
    whole = CachedDecoder(program, len(rows), 32)
    found = whole.prefill(rows)
    next_token = torch.randint(0, 64, (len(rows), 1), generator=generator)
    after = whole.extend(next_token)["logits"]
    for number, row in enumerate(rows):
        alone = CachedDecoder(program, 1, 32)
        expected = alone.prefill([row])[0]["logits"]
        assert torch.allclose(found[number]["logits"], expected, atol=1e-10, rtol=0)
        assert torch.allclose(
            after[number], alone.extend(next_token[number : number + 1])["logits"][0], atol=1e-10, rtol=0
        )
    assert whole.lengths == lengths


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_lines(lengths: list[int]) -> None:
    """Every row with tokens stands in one line, no line is too long, and no two lines would fit into one."""
    capacity = max(lengths)
    lines = packed(lengths, capacity)
    assert sorted(r for line in lines for r in line.rows) == [r for r, n in enumerate(lengths) if n]
    assert all(line.length == sum(lengths[r] for r in line.rows) <= capacity for line in lines)
    shortest = sorted(line.length for line in lines)[:2]
    assert len(shortest) < 2 or sum(shortest) > capacity


@pytest.mark.parametrize(("kind", "lines"), [("llama", 2), ("bloom", None), ("mamba2", None)])
def test_who_is_packed(kind: str, lines: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what adds a bias by place, and not what keeps a state; nor prompts longer than a piece."""
    decoder = CachedDecoder(program_of(kind), 4, 64)
    found = decoder._lines([20, 7, 6, 5])
    assert (found if found is None else len(found)) == lines
    assert decoder._lines([20, 19, 20, 18]) is None
    monkeypatch.setattr(cached_decoder, "PIECE", 16)
    assert decoder._lines([20, 7, 6, 5]) is None
