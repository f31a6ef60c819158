#!/usr/bin/env bash
# transformers 5.23.0: generate of an encoder-decoder returns the tokens of decoder_input_ids and then the new ones, as BART
# does: 3 + 5 tokens. Whisper's own generate, given the same arguments, returns the new ones alone: 5. A slice that skips the
# beginning, right for every other encoder-decoder, drops the first tokens of a Whisper transcript without an error.
# Fails if both return the same number of tokens.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch
from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

torch.manual_seed(0)
sizes = {
    "vocab_size": 96, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}
bart = BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=32)).eval()
whisper = WhisperForConditionalGeneration(
    WhisperConfig(**sizes, num_mel_bins=4, max_source_positions=8, max_target_positions=32, suppress_tokens=None,
                  begin_suppress_tokens=None)
).eval()
given = {
    "decoder_input_ids": torch.tensor([[3, 7, 9]]), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False,
}
first = bart.generate(torch.tensor([[5, 6, 7]]), **given)
second = whisper.generate(input_features=torch.randn(1, 4, 16), **given)
print(f"BART: {first.shape[1]} tokens, beginning with {first[0, :3].tolist()}; Whisper: {second.shape[1]} tokens")
assert first.shape[1] == 8 and first[0, :3].tolist() == [3, 7, 9], "BART returns something else now"
assert second.shape[1] == 5, "Whisper returns what it was given as well now"
PYTHON
