#!/usr/bin/env bash
# torch 2.13.0: torch.func.functional_call promises that a module has its own parameters again after the call. Where a
# submodule is registered under two names and tie_weights=False is given a tensor for each name (with tied weights it
# refuses several tensors), the last tensor stays in the module, as a plain tensor, without an error: the second name's
# "original" is the tensor that the first name put there, and is restored last.
# A model that was asked on tensors without memory so loses its weights.
# Seen: after the call the weight is a Tensor of zeros, not the parameter; under distinct modules it is the parameter.
# Fails if the parameter is restored.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PYTHON'
import torch
from torch import nn


class Twice(nn.Module):
    """Calls one layer twice, or two layers."""

    def __init__(self, shared: bool):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first if shared else nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def restored(shared: bool) -> bool:
    """Return whether the layer has its own parameter after a functional call with zeros."""
    model = Twice(shared)
    weight = model.first.weight
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters(remove_duplicate=False)}
    torch.func.functional_call(model, zeros, (torch.ones(1, 2),), tie_weights=False)
    print(f"shared: {shared}, after the call: {type(model.first.weight).__name__} {model.first.weight.tolist()}")
    return model.first.weight is weight


assert restored(False), "even distinct modules are not restored"
assert not restored(True), "shared modules are restored now"
PYTHON
