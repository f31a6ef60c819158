#!/usr/bin/env bash
# torch 2.13.0 on a CPU: conv1d in float64 with as many groups as channels, as short convolutions before state space layers
# are, takes many times as long as the same sum written as one product for each tap, where no oneDNN kernel serves it. Seen for
# 1,792 channels, 4 taps, 64 tokens, one thread: 12.3 ms beside 0.84 (15 times). In float32 both take about as long (1.0 and
# 1.1 times). So a check in float64 of a model with such layers spends its time there.
# Fails if float64 takes less than 3 times as long.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import statistics
import time

import torch
from torch.nn import functional as F

torch.set_num_threads(1)


def ratio(dtype: torch.dtype, channels: int, tokens: int, taps: int = 4) -> float:
    """Return how many times as long conv1d takes as products of shifted inputs, by processor time."""
    torch.manual_seed(0)
    x = torch.randn(2, channels, tokens + taps - 1, dtype=dtype)
    weight = torch.randn(channels, 1, taps, dtype=dtype)

    def convolution() -> torch.Tensor:
        return F.conv1d(x, weight, groups=channels)

    def products() -> torch.Tensor:
        y = x[:, :, :tokens] * weight[:, :, 0]
        for tap in range(1, taps):
            y = torch.addcmul(y, x[:, :, tap : tap + tokens], weight[:, :, tap])
        return y

    torch.testing.assert_close(convolution(), products(), rtol=1e-4, atol=1e-4)
    seconds: dict[str, list[float]] = {"convolution": [], "products": []}
    for _ in range(15):
        for function in (convolution, products):
            began = time.process_time()
            function()
            seconds[function.__name__].append(time.process_time() - began)
    one, other = (statistics.median(seconds[name]) for name in ("convolution", "products"))
    print(f"{dtype}, {channels} channels, {tokens} tokens: {one * 1e3:.2f} ms beside {other * 1e3:.2f}, {one / other:.1f} times")
    return one / other


ratio(torch.float32, 1792, 64)
ratio(torch.float32, 1792, 512)
assert ratio(torch.float64, 1792, 64) > 3, "the convolution is about as fast now"
PYTHON
