#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: quantize_4bit gives a scale to each 64 numbers of the flattened matrix, so that blocks cross
# rows whose length is no multiple of 64. dequantize_4bit's kernel starts a new block at each row, and gives other values:
# not those of rounding to nf4, and not those of the library's own generic implementation of the same call.
# transformers loads such checkpoints on a CPU through that kernel, without an error.
# Seen for (64, 96): most numbers differ, by up to several times the largest rounding error; for (64, 128) none does.
# Fails if both shapes are dequantised rightly.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def wrong(rows: int, columns: int) -> int:
    """Return how many numbers of a dequantised matrix are not table[code] * scale of their block of 64."""
    torch.manual_seed(0)
    matrix = torch.randn(rows, columns)
    packed, state = quantize_4bit(matrix, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    expected = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view(rows, columns)
    found = dequantize_4bit(packed, state)
    count = int((found != expected).sum())
    print(f"({rows}, {columns}): {count} numbers differ; largest error {float((found - matrix).abs().max()):.2f}, "
          f"by the formula {float((expected - matrix).abs().max()):.2f}")
    return count


assert not wrong(64, 128), "even whole blocks in a row are dequantised otherwise"
assert wrong(64, 96), "blocks that cross rows are dequantised rightly now"
PYTHON
