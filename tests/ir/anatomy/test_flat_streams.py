"""Streams whose rows lie one after another between some layers, as in OPT: (batch * sequence, size)."""

from __future__ import annotations

import pytest
import torch

import graphopt

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=128, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(4, 120, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program(model: torch.nn.Module, ids: torch.Tensor) -> graphopt.Program:
    return graphopt.capture(model, {"input_ids": ids})


def without(model: torch.nn.Module, gone: list[int], ids: torch.Tensor) -> torch.Tensor:
    decoder = model.model.decoder
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)
    try:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        decoder.layers = layers
    return found


@pytest.mark.parametrize("gone", [[0], [1], [3], [1, 2], [0, 3]])
def test_any_layers_may_go(gone: list[int], model, program, ids) -> None:
    shorter = graphopt.optimize(program, f"skip-layers{{layers=[{' '.join(map(str, gone))}]}}")
    for rows in (ids, ids[:1, :5]):
        assert torch.allclose(shorter(input_ids=rows)["logits"], without(model, gone, rows), atol=1e-5)


@pytest.mark.parametrize("score", ["cosine", "angular"])
def test_layers_are_scored_across_both_forms(score: str, program, ids) -> None:
    data = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]
    shorter = graphopt.optimize(program, f"skip-layers{{remove=1 score={score}}}", data=data)
    assert len(shorter.anatomy.layers) == 3


def test_layers_are_skipped_while_decoding(model, program, ids) -> None:
    dialled = graphopt.optimize(program, "skip-layers{layers=[2] phase=decode}")
    assert torch.allclose(dialled(input_ids=ids)["logits"], program(input_ids=ids)["logits"], atol=1e-5)
    found = dialled(input_ids=ids, decoding=1)["logits"]
    assert torch.allclose(found, without(model, [2], ids), atol=1e-5)


def test_a_draft_reads_streams_of_both_forms(program, ids) -> None:
    drafting = graphopt.optimize(program, "attach-draft")
    found = drafting(input_ids=ids)
    assert found["draft_logits"].shape == (2, 12, 128)
    assert found["draft_features"].shape == found["draft_hidden"].shape == (2, 12, 32)
    assert torch.allclose(found["logits"], program(input_ids=ids)["logits"], atol=1e-5)
