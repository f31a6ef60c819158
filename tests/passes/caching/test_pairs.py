"""Keys that tokens pick by what they compute for pairs, and scores of sinks: cached text is that of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

import graphopt
from graphopt.decoding.generation import with_cache
from graphopt.ir.errors import PassRefusedError, UsageError
from graphopt.ir.facts import KVCache
from graphopt.ir.schema import arguments, is_operator
from graphopt.passes.caching.comparing import compare_with_cache

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
CONFIGS = {
    # of up to 27 tokens, an indexer picks twelve; with few heads, scores of zero would tie
    "deepseek_v32": transformers.DeepseekV32Config(
        **SIZES, **LATENT, index_topk=12, index_n_heads=8, index_head_dim=16, n_group=1, topk_group=1
    ),
    "doge": transformers.DogeConfig(**SIZES, num_key_value_heads=2),
    "granite_swa": transformers.GraniteSWAConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
}
ROWS = [[5, 9, 17, 40, 3, 8, 22], [12], [7, 7, 30]]
NEW = 20


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * 0.3
                if parameter.dim() > 1
                else parameter + torch.randn(()) * 0.1
            )
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_that_of_transformers(name: str) -> None:
    model = model_of(name)
    cached = with_cache(graphopt.capture(model, {"input_ids": torch.tensor(ROWS[:1])}))
    written = graphopt.generate(cached, ROWS, max_new_tokens=NEW)[:, -NEW:].tolist()
    with torch.no_grad():
        expected = [
            model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)[0, len(row) :].tolist()
            for row in ROWS
        ]
    assert len({token for row in expected for token in row}) > 8
    assert written == expected


def test_picked_keys_have_no_trees() -> None:
    """Candidates of one depth share a position; the pass says so, and decoding goes on without trees."""
    program = graphopt.capture(model_of("doge"), {"input_ids": torch.tensor(ROWS[:1])})
    with pytest.raises(PassRefusedError, match="trees do not say"):
        graphopt.optimize(program, "insert-cache{tree=true}")
    cached = with_cache(program)
    assert not cached.facts[KVCache].tree
    with pytest.raises(UsageError, match="candidates need inputs"):
        graphopt.generate(cached, ROWS, max_new_tokens=4, strategy="prompt-lookup")


def test_a_picked_key_in_pieces() -> None:
    """Tokens that see more keys than they may pick, whose scores follow from values: different tokens do not tie."""
    config = transformers.DogeConfig(**SIZES, num_key_value_heads=2, keep_window_size=4)
    torch.manual_seed(1)
    model = transformers.DogeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    program = graphopt.capture(model, {"input_ids": torch.arange(9)[None]})
    assert any(is_operator(n, "aten.topk") for n in program.nodes)
    cached = graphopt.optimize(program, "insert-cache")
    for seed in range(3):
        worst = compare_with_cache(program, cached, tokens=11, seed=seed)
        assert worst is not None
        assert worst.error < 1e-12


def test_sums_of_scores_are_sinks() -> None:
    """An output that is scaled by how much its scores outweigh a number is attention with one more score."""
    program = graphopt.capture(model_of("granite_swa"), {"input_ids": torch.tensor(ROWS[:1])})
    cores = [n for n in program.nodes if is_operator(n, "graphopt.attention")]
    assert len(cores) == 2
    assert all(arguments(core)["sinks"] is not None for core in cores)
    assert not any(is_operator(n, "aten.logsumexp") for n in program.nodes)
