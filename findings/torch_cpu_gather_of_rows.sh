#!/usr/bin/env bash
# torch 2.13.0, CPU: picking whole rows of a cache with gather, whose index repeats each row's number along the row, copies
# number by number; index_select on the same memory seen as one matrix copies rows. 512 of 8,192 rows of 64 float32 for each of
# three heads, one thread: 490 microseconds beside 58 (advanced indexing: 236). Whoever lets tokens read a chosen part of a
# cache loses to the gather what was won by reading less. Fails if gather is no longer 3 times as slow as index_select.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
heads, slots, chosen, size = 3, 8192, 512, 64
cache = torch.randn(heads, slots, size)
index = torch.stack([torch.randperm(slots)[:chosen] for _ in range(heads)])


def microseconds(call) -> float:
    call()
    best = 1e9
    for _ in range(9):
        began = time.process_time()
        for _ in range(20):
            call()
        best = min(best, time.process_time() - began)
    return best / 20 * 1e6


flat = cache.view(-1, size)
starts = torch.arange(heads)[:, None] * slots
gathered = lambda: cache.gather(1, index[..., None].expand(-1, -1, size))
selected = lambda: flat.index_select(0, (index + starts).flatten()).view(heads, chosen, size)
assert torch.equal(gathered(), selected())
slow, fast = microseconds(gathered), microseconds(selected)
print(f"gather {slow:.0f}, index_select {fast:.0f} microseconds: {slow / fast:.1f} times")
assert slow > 3 * fast, "gather is no longer several times as slow"
PYTHON
