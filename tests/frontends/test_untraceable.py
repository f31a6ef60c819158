"""What transformers writes for an export alone, in other words while a model is traced."""

from __future__ import annotations

import pytest
import torch

from graphopt.frontends.untraceable import inverse_of_unit_lower, traceable
from graphopt.ir.compat import exporting


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_inverse_of_triangular_matrices(size: int) -> None:
    """Wrong if what is stored on or above the diagonal counted, or accuracy were lost where all rows are alike."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(3, 2, size, size, generator=generator)
    alike = torch.full((1, 2, size, size), 0.99)
    matrix, right = torch.cat([drawn, alike]), torch.randn(4, 2, size, 3, generator=generator)
    expected = torch.linalg.solve_triangular(matrix.double(), right.double(), upper=False, unitriangular=True)
    found = inverse_of_unit_lower(matrix) @ right
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_other_systems_are_solved_as_they_are() -> None:
    matrix = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    right = torch.eye(2)
    with traceable():
        lower = torch.linalg.solve_triangular(matrix, right, upper=False)
        upper = torch.linalg.solve_triangular(matrix.mT, right, upper=True, unitriangular=True)
    assert torch.allclose(matrix @ lower, right)
    assert torch.allclose(torch.tensor([[1.0, 3.0], [0.0, 1.0]]) @ upper, right)


def test_linear_attention_is_not_one_substitution_a_row() -> None:
    """Wrong if an export had hundreds of operators for each chunk, or gave other values than the model."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 7, 2, 8, generator=generator) for _ in range(3))
    decay, beta = (-torch.rand(2, 7, 2, generator=generator), torch.rand(2, 7, 2, generator=generator))

    class Rule(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = rule(*inputs, use_qk_l2norm_in_kernel=True)[0]
            return result

    inputs = (query, key, value, decay, beta)
    before = modeling_qwen3_next.is_torchdynamo_exporting
    expected = Rule()(*inputs)
    with traceable():
        exported = torch.export.export(Rule(), inputs)
        with exporting():
            assert torch.allclose(Rule()(*inputs), expected, atol=1e-6)
    assert modeling_qwen3_next.is_torchdynamo_exporting is before
    assert torch.allclose(exported.module()(*inputs), expected, atol=1e-6)
    calls = [n for n in exported.graph.nodes if n.op == "call_function"]
    assert len(calls) < 400
    assert not any("solve_triangular" in str(n.target) for n in calls)
