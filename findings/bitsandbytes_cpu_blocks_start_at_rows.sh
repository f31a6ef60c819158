#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: quantize_4bit gives a scale to each run of 64 numbers of the flattened matrix, so that blocks
# cross rows where these are no multiple of 64 long; dequantize_4bit starts a new block at each row. What comes back is then
# scaled by the scales of other blocks, without an error: a matrix of 8 by 96 comes back 0.3 off, one of 8 by 128 as by the rule.
# Checkpoints hold what the quantiser made: the codes and scales are right, and only reading them on a CPU is not.
# Fails if the values become those of the quantiser's rule.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check bitsandbytes==0.50.2
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
off = {}
for columns in (96, 128):
    weight = torch.randn(8, columns)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    read = dequantize_4bit(packed, state)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    by_rule = (state.code[nibbles] * scales).reshape(8, columns)
    off[columns] = float((read - by_rule).norm() / by_rule.norm())
    print(f"8 by {columns}: read {off[columns]:.3f} off the quantiser's rule, "
          f"which is {float((by_rule - weight).norm() / weight.norm()):.3f} off the weights")
assert off[128] < 1e-6, "whole blocks are read by another rule now"
assert off[96] > 0.05, "blocks that cross rows are read right now"
PYTHON
