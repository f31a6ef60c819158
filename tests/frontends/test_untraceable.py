"""What transformers writes for an export alone, in other words while a model is traced."""

from __future__ import annotations

import importlib

import pytest
import torch

from graphopt.frontends.untraceable import inverse_of_unit_lower, traceable


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


@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen4_exp"])
def test_delta_rules_are_one_operator(model: str) -> None:
    """What the library writes for an export, one substitution for each row of a chunk, is never traced."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 7, 2, 8, generator=generator) for _ in range(3))
    decay, beta = (-torch.rand(2, 7, 2, generator=generator), torch.rand(2, 7, 2, generator=generator))

    class Rule(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = module.torch_chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[
                0
            ]
            return result

    inputs = (query, key, value, decay, beta)
    expected = Rule()(*inputs)
    with traceable():
        exported = torch.export.export(Rule(), inputs)
    assert torch.allclose(exported.module()(*inputs), expected, atol=1e-6)
    calls = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert calls.count("graphopt.linear_attention.default") == 1
    assert len(calls) < 40
