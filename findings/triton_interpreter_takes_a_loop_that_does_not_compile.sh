#!/usr/bin/env bash
# Triton 3.9.0: a name that is bound before a loop and bound anew inside it, to a tensor of another shape, is a variable of
# the loop for the compiler, which refuses it, even if the loop never reads the earlier value ("Loop-carried variable at has
# initial type <['16', '1'], ...> but is re-assigned to <['16'], ...>"). Triton's interpreter (TRITON_INTERPRET=1) runs the same
# kernel and gives the right numbers: a kernel that is only tried there may not compile for any GPU. Seen with the compiler
# alone, for sm_90, without a GPU. Fails if the interpreter refuses the kernel or the compiler takes it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cd "$place"
cat >kernel.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def summed(x, out, N: tl.constexpr):
    at = x + tl.arange(0, N)[:, None]
    total = tl.load(at)
    for _ in range(2):
        at = x + tl.arange(0, N)
        total += tl.load(at)[:, None]
    tl.store(out + tl.arange(0, N)[:, None], total)
PYTHON
TRITON_INTERPRET=1 "$place/env/bin/python" - <<'PYTHON'
import torch
from kernel import summed

x, out = torch.arange(16.0), torch.zeros(16)
summed[(1,)](x, out, N=16)
assert torch.equal(out, 3 * x)
print("interpreter: right")
PYTHON
"$place/env/bin/python" - <<'PYTHON'
import triton
from kernel import summed
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(summed, {"x": "*fp32", "out": "*fp32", "N": "constexpr"}, {"N": 16})
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
except Exception as error:
    print("compiler:", str(error).strip().splitlines()[-1][:200])
    assert "Loop-carried variable" in str(error), "refused for another reason"
else:
    raise SystemExit("the compiler takes the kernel now")
PYTHON
