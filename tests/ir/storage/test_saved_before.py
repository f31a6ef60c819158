"""Programs that were saved before facts had types: they load, compute what they did, and go where they could go.

``saved_before/decoder`` went through attach-multi-token-heads, attach-early-exit and insert-kv-cache, ``saved_before/shorter``
lost its first layer; both are of one Llama of two layers with random weights, and the numbers here are what the
graphopt that saved them computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paths import TESTS
from transformers import LlamaForCausalLM

import graphopt
from graphopt.ir.facts import CheckpointChanges, EarlyExits, KVCache, MultiTokenHeads, RemovedLayers

SAVED = TESTS / "ir" / "storage" / "saved_before"
IDS = torch.arange(6)[None] + 3


def test_a_decoder_writes_what_it_wrote() -> None:
    program = graphopt.load(SAVED / "decoder", check_hashes=True)
    assert program.facts[KVCache] == KVCache(16, 2, False, "input_ids", "position_ids", None, "logits")
    assert program.facts[MultiTokenHeads] == MultiTokenHeads(1, 1, False)
    assert program.facts[EarlyExits].layers == {"exit_logits": 0}
    text = graphopt.generate(program, IDS.tolist(), max_new_tokens=5, eos_token_id=None)
    assert text.tolist() == [[3, 4, 5, 6, 7, 8, 2, 12, 22, 11, 4]]


def test_a_shorter_model_still_goes_back_to_a_folder(tmp_path: Path) -> None:
    program = graphopt.load(SAVED / "shorter", check_hashes=True)
    assert program.facts[CheckpointChanges].removed_layers == (RemovedLayers("model.layers.", 2, (0,)),)
    logits = program(input_ids=IDS)["logits"]
    expected = torch.tensor([-0.03042432, -0.11960255, 0.10102521, -0.06131529])
    assert torch.allclose(logits[0, -1, :4], expected, atol=1e-6)
    program.save_pretrained(tmp_path / "folder")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert again.config.num_hidden_layers == 1
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, logits, atol=1e-6)


@pytest.mark.parametrize("name", ["decoder", "shorter"])
def test_saved_again_they_have_facts_of_today(name: str, tmp_path: Path) -> None:
    program = graphopt.load(SAVED / name)
    program.save(tmp_path / name)
    assert graphopt.load(tmp_path / name).facts == program.facts
