#!/usr/bin/env bash
# torch 2.13.0: torch.export of x.reshape(-1, 3, 2), both sizes of x declared Dim.DYNAMIC, keeps whether the computed size
# happened to equal the first size of the example. From (2, 6), where 2 * 6 / 6 = 2, the output is recorded as
# (rows, 3, columns // 3), and (2, 9) and (3, 4), which the module takes, fail a guard; from (4, 9), (4, 6) fails the
# opposite one. Neither is said at export: range_constraints are [2, oo) for both sizes.
# Seen: "Guard failed: x.size()[1] * x.size()[0] // 6 == x.size()[0]", and the same with !=.
# Fails if either is taken.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch


class ThreesAndTwos(torch.nn.Module):
    def forward(self, x):
        return x.reshape(-1, 3, 2)


def refused(example, given):
    """Tell what the program exported from one shape says to another, which the module itself takes."""
    varies = torch.export.Dim.DYNAMIC
    model = ThreesAndTwos()
    program = torch.export.export(model, (torch.zeros(example),), dynamic_shapes={"x": {0: varies, 1: varies}})
    ranges = {(int(r.lower), str(r.upper)) for r in program.range_constraints.values()}
    assert ranges == {(2, "int_oo")}, f"the ranges say more now: {ranges}"
    assert model(torch.zeros(given)).shape[1:] == (3, 2)
    try:
        program.module()(torch.zeros(given))
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


for example, given in (((2, 6), (2, 9)), ((2, 6), (3, 4)), ((4, 9), (4, 6))):
    told = refused(example, given)
    print(f"exported from {example}, given {given}: {told}")
    assert told is not None and "// 6" in told, "it is taken now"
PYTHON
