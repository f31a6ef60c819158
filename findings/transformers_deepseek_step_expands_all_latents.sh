#!/usr/bin/env bash
# transformers 5.23.0: the cache of DeepSeek V2 holds latents (one head of kv_lora_rank numbers a token), and every cached step
# multiplies all of them by kv_b_proj again: a step of one token after 1,024 tokens takes as many more operations in that
# projection as there are more tokens, 590,848 in matrix products after 64, 2,163,712 after 256, 8,455,168 after 1,024. The
# memory of latent attention is saved, the time of decoding is not; moving the matrix into queries and outputs gives the same
# result with products that do not grow. V3 and its relatives share the code. Fails if products stop growing with the text.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

torch.manual_seed(0)
model = DeepseekV2ForCausalLM(DeepseekV2Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4,
    moe_intermediate_size=16, num_experts_per_tok=2, first_k_dense_replace=1,
)).eval()
found = {}
with torch.no_grad():
    for length in (64, 256, 1024):
        cache = model(torch.randint(0, 64, (1, length)), use_cache=True).past_key_values
        kept = [tuple(t.shape) for t in (cache.layers[0].keys, cache.layers[0].values)]
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[5]]), past_key_values=cache)
        found[length] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        print(f"after {length} tokens: kept {kept}, a step takes {found[length]:,} operations in matrix products")
        assert kept == [(1, 1, length, 32), (1, 1, length, 8)], "something else than latents is kept now"
# kv_b_proj: 2 * 32 * 4 * (16 + 16) operations for each token of the text
assert found[1024] - found[256] == 768 * 2 * 32 * 4 * 32, "earlier latents are not multiplied again any more"
PYTHON
