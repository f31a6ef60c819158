"""Heads on a stream of several copies (hyper-connections): attached where that has a meaning, else refused."""

from __future__ import annotations

import nested_networks
import pytest
import torch

import graphopt
from graphopt.ir.errors import PassRefusedError


class Decoder(nested_networks.HyperConnections):
    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids)}


@pytest.fixture(scope="module")
def program() -> graphopt.Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    return graphopt.capture(Decoder(layers=3).eval(), {"input_ids": ids}, compare=False)


def test_a_draft_is_refused(program: graphopt.Program) -> None:
    with pytest.raises(PassRefusedError, match="its stream has several copies"):
        graphopt.optimize(program, "attach-draft")


def test_a_layer_can_be_skipped(program: graphopt.Program) -> None:
    shorter = graphopt.optimize(program, "skip-layers{layers=[1]}")
    assert len(shorter.anatomy.layers) == 2
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = Decoder(layers=3).eval()
    for name in ("blocks", "reads", "writes", "mixes"):
        parts = list(getattr(model, name))
        kind = type(getattr(model, name))
        setattr(model, name, kind([*parts[:2], *parts[4:]]))
    with torch.no_grad():
        expected = model(ids)["logits"]
    assert torch.allclose(shorter(input_ids=ids)["logits"], expected, atol=1e-5)
