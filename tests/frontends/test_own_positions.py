"""Models that count positions their own way, from behind the number of padding: they are left to do so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.ir.errors import GraphoptError

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 1, "is_decoder": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Roberta", "Camembert"])
def test_positions_are_left_to_the_model(name: str, tmp_path: Path) -> None:
    """Wrong if they were counted from 0, which these models never saw in training; the capture was refused instead."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "model")
    program = graphopt.capture(tmp_path / "model")
    assert "position_ids" not in program.signature.inputs
    ids = torch.randint(3, 100, (3, 11))
    mask = torch.ones_like(ids)
    ids[1, :4] = 1
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    found = program(input_ids=ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    shorter = graphopt.optimize(program, "skip-layers{layers=[1]}")
    assert max(shorter.save_pretrained(tmp_path / "out").errors.values()) < 1e-5
    with pytest.raises(GraphoptError, match="results in chunks differ"):
        graphopt.optimize(program, "insert-cache")
