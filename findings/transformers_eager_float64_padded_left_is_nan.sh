#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: eager attention in float64 over rows padded on the left gives NaN at every position of
# such a row, the ones that count included; float32 and bfloat16 are finite, and so is float64 with sdpa. The mask is made of
# float64's least number, and softmax is asked for in float32, where that number is -infinity: the rows of padding see
# nothing, become NaN, and are keys of the next layer, where NaN times a weight of 0 is NaN. Gemma 2 is always eager. So a
# float64 reference, which one makes to judge rounding, is no reference here.
# Seen: NaN in all 9 positions of the padded row, none in the other row.
# Fails if the row comes out finite.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import torch
import transformers

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}


def positions_of_nan(name, attention, dtype):
    """Count the positions of a row without padding, and of one with four tokens of it on the left, that are NaN."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, attn_implementation=attention)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    ids = torch.randint(3, 100, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.isnan().any(-1).sum(1).tolist()


for name in ("Gemma2", "Llama", "Qwen2"):
    for attention in ("eager", "sdpa") if name != "Gemma2" else ("eager",):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            found = positions_of_nan(name, attention, dtype)
            print(f"{name:7} {attention:6} {str(dtype):15} positions of NaN by row: {found}")
            expected = [0, 9] if (attention, dtype) == ("eager", torch.float64) else [0, 0]
            assert found == expected, "it is otherwise now"
PYTHON
