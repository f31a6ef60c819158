"""Caches at real sizes: what is checked on one layer of each kind, and defaults of configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt.passes.caching import comparing


def decoder(config: Any, model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**options)).eval()


@pytest.mark.parametrize("kinds", [1, 2])
def test_many_layers_are_checked_by_one_of_each_kind(kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of weights; the program itself keeps all its layers and writes the model's text."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.setattr(comparing, "LARGE", 20_000)
    model = decoder(
        Qwen2Config, Qwen2ForCausalLM, vocab_size=101, hidden_size=36, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=9, num_key_value_heads=3, initializer_range=0.3, max_position_embeddings=64,
        use_sliding_window=True, sliding_window=5, layer_types=(["full_attention", "sliding_attention"] * 3)[:: 3 - kinds] * (3 - kinds),
    )  # fmt: skip
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})
    small = comparing.reduced(program)
    assert small is not None and len(small.anatomy.layers) == kinds
    assert len(program.anatomy.layers) == 6
    made = graphopt.optimize(program, "insert-kv-cache")
    assert made.facts["kv_cache"]["layers"] == 6
    assert made.report.passes[-1].checks == 1
    ids = torch.tensor([[5, 9, 17, 40, 3, 8, 22]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(graphopt.generate(made, ids, max_new_tokens=20, eos_token_id=None), expected)
    assert len(set(expected[0, 7:].tolist())) > 4
