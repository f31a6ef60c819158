"""Mixers written out as published models write them: recognised, given caches or states, and refused where they differ."""

from __future__ import annotations

import random

import pytest
import torch
from amounts import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spelled_mixers import LONGEST, MIXERS, VOCABULARY, Retention

import graphopt
from graphopt.decoding.generation import with_cache
from graphopt.ir.errors import PassRefusedError
from graphopt.ir.facts import KVCache, StateCache
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator

NEW = 12
KEPT = {"windows": (0, 1), "retention": (0, 1)}
"""Layers with keys, and states; all others keep keys alone."""


def captured(model: torch.nn.Module) -> Program:
    return graphopt.capture(model.eval(), {"input_ids": torch.randint(0, VOCABULARY, (2, 7))})


def rows(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 20))] for _ in range(3)]


def continued(model: torch.nn.Module, row: list[int]) -> list[int]:
    """Return the text that the model itself writes, all of it computed at every step."""
    text = list(row)
    with torch.no_grad():
        for _ in range(NEW):
            text.append(int(model(torch.tensor([text]))["logits"][0, -1].argmax()))
    return text[len(row) :]


@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=examples(4), phases=[Phase.generate])
@given(seed=st.integers(0, 1 << 16))
def test_text_is_that_of_the_model(name: str, seed: int) -> None:
    model = MIXERS[name](seed)
    cached = with_cache(captured(model))
    keys, states = KEPT.get(name, (1, 0))
    held = cached.facts.get(StateCache)
    assert (cached.facts[KVCache].layers, len(held.states) if held else 0) == (keys, states)
    texts = rows(seed)
    for strategy in (None, "token-recycling") if cached.facts[KVCache].tree else (None,):
        written = graphopt.generate(cached, texts, max_new_tokens=NEW, eos_token_id=None, strategy=strategy)
        for row, found in zip(texts, written[:, -NEW:].tolist(), strict=True):
            assert found == continued(model, row), (name, strategy)


@settings(max_examples=examples(6), phases=[Phase.generate])
@given(seed=st.integers(0, 1 << 16), block=st.integers(8, 20), tokens=st.integers(1, LONGEST))
def test_retention_holds_beyond_its_block(seed: int, block: int, tokens: int) -> None:
    """The export knows one block; what is captured is right for any number of them, which is tried against the model."""
    model = Retention(seed, block, dtype=torch.float64).double().eval()
    program = captured(model)
    assert any(is_operator(n, "graphopt.linear_attention") for n in program.nodes)
    assert program.signature.sizes["sequence"].high is None and not program.signature.constraints
    ids = torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, found = model(ids)["logits"], program(ids)["logits"]
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decays_in_few_bits(dtype: torch.dtype) -> None:
    program = captured(Retention(2, dtype=dtype).to(dtype))
    assert any(is_operator(n, "graphopt.linear_attention") for n in program.nodes)


@pytest.mark.parametrize("broken", ["later", "uneven", "growing"])
def test_another_table_is_no_decay(broken: str) -> None:
    model = Retention(1, LONGEST, broken)
    program = captured(model)
    assert not any(is_operator(n, "graphopt.linear_attention") for n in program.nodes)
    with pytest.raises(PassRefusedError, match="recognised"):
        graphopt.optimize(program, "insert-cache")
