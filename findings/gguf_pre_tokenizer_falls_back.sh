#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: a byte-level GGUF tokenizer whose `tokenizer.ggml.pre` transformers does not know is
# cut by GPT-2's rule, without a warning. llama.cpp knows "smollm" (src/llama-vocab.cpp: digits one by one, then GPT-2's
# rule), so that the same file gives other tokens for numbers wherever the vocabulary joins digits.
# Seen: "in 2024" is i, n, Ġ, 2024 under "smollm", as under "gpt-2"; under "qwen2", which transformers knows, digits stay apart.
# Fails if transformers comes to know "smollm".
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
from pathlib import Path

import gguf
import numpy
from transformers import AutoTokenizer


def alphabet() -> list[str]:
    """Return the 256 characters by which byte-level vocabularies write bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(rest))]


def write(path: Path, pre: str) -> None:
    """Write a model of no layers whose vocabulary joins the digits of 2024."""
    tokens = [*alphabet(), "20", "202", "2024", "<end>"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(8)
    out.add_feed_forward_length(16)
    out.add_head_count(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([1] * (len(tokens) - 1) + [3])
    out.add_token_merges(["2 0", "20 2", "202 4"])
    out.add_eos_token_id(len(tokens) - 1)
    out.add_tensor("token_embd.weight", numpy.zeros((len(tokens), 8), dtype=numpy.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


found = {}
for pre in ("gpt-2", "smollm", "qwen2"):
    folder = Path(pre)
    folder.mkdir()
    write(folder / "model.gguf", pre)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file="model.gguf")
    found[pre] = tokenizer.tokenize("in 2024")
    print(f"{pre}: {found[pre]}")
assert found["qwen2"][-4:] == ["2", "0", "2", "4"], "a known rule is no longer followed"
assert found["smollm"] == found["gpt-2"] == ["i", "n", "Ġ", "2024"], "smollm's own rule is followed now"
PYTHON
