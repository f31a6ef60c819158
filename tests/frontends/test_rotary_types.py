"""Rotary embeddings that change with the length of the text are refused with what is true of them, in few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import graphopt
from graphopt.frontends.rotary_types import refuse_varying_frequencies
from graphopt.ir.errors import CaptureError

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip


def llama(rope: dict[str, Any] | None) -> nn.Module:
    config = T.LlamaConfig(**SMALL)
    if rope is not None:
        config.rope_parameters = rope
    torch.manual_seed(0)
    return T.LlamaForCausalLM(config).eval()


def test_the_refusal_of_dynamic_frequencies_is_true_and_short(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = llama(DYNAMIC)
    model.save_pretrained(tmp_path / "m")
    capfd.readouterr()
    for what in (tmp_path / "m", model):
        inputs = None if isinstance(what, Path) else {"input_ids": torch.zeros(1, 5, dtype=torch.long)}
        with pytest.raises(CaptureError, match="anew for every text longer than 24 tokens") as refused:
            graphopt.capture(what, inputs)
    assert len(str(refused.value).splitlines()) == 2
    assert len(capfd.readouterr().err.splitlines()) < 5
    # what the hint says: without it the model is the same up to there, and another beyond
    plain = llama(None)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(1, 64, (1, 40))
    with torch.no_grad():
        assert torch.equal(plain(ids[:, :24]).logits, model(ids[:, :24]).logits)
        assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-6)


def test_longrope_is_refused_wherever_it_stands() -> None:
    with pytest.raises(CaptureError, match="short_factor for texts of up to 16 tokens"):
        graphopt.capture(llama(LONGROPE), {"input_ids": torch.zeros(1, 5, dtype=torch.long)})
    for config in (T.Gemma3TextConfig(), T.LlavaConfig(text_config=T.LlamaConfig(**SMALL))):
        refuse_varying_frequencies(config)
    layered = T.Gemma3TextConfig()
    layered.rope_parameters = {
        "full_attention": dict(LONGROPE),
        "sliding_attention": {"rope_type": "default"},
    }
    nested = T.LlavaConfig(text_config=T.LlamaConfig(**SMALL))
    nested.text_config.rope_parameters = dict(DYNAMIC)
    for config in (layered, nested):
        with pytest.raises(CaptureError):
            refuse_varying_frequencies(config)


def test_an_export_that_fails_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    capfd.readouterr()
    with pytest.raises(CaptureError, match="torch.export cannot capture Branching"):
        graphopt.capture(Branching(), torch.randn(2, 3))
    assert capfd.readouterr().err == ""


def test_a_file_that_is_none_prints_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt2").write_bytes(b"garbage")
    capfd.readouterr()
    with pytest.raises(graphopt.CheckpointError, match=r"x\.pt2 cannot be read"):
        graphopt.capture(tmp_path / "x.pt2", trust=True)
    assert capfd.readouterr().err == ""
