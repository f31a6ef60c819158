"""The one definition of how far a value is from what it should be, and that nothing has another."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from graphopt.backends.checking.cases import Case
from graphopt.backends.onnx.compare import _error as onnx_error
from graphopt.frontends.compare import counted_error
from graphopt.ir.checking.comparison import relative_error

SOURCE = ROOT / "src" / "graphopt"
BESIDE = ("largest", "norm", "element")
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def judges(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    case = Case("a case", {}, None)
    judged = {b: relative_error(found, expected, beside=b) for b in BESIDE}
    judged["captures"] = counted_error(found, expected)
    for whole in (False, True):
        error = onnx_error(found, expected, case, whole)
        assert error is not None
        judged[f"onnx {whole}"] = error
    return judged


@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_what_is_not_finite_where_the_reference_is_fails_everywhere(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    size = data.draw(st.integers(1, 6))
    expected = torch.linspace(-1, 1, size).to(dtype)
    found = expected.clone()
    found[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from(NOT_FINITE))
    assert set(judges(found, expected).values()) == {float("inf")}
    assert relative_error([expected, found], [expected, expected]) == float("inf")
    assert relative_error([found, expected], [expected, expected]) == float("inf")


@given(st.data())
def test_a_number_where_the_reference_is_not_finite_fails_everywhere(data: st.DataObject) -> None:
    expected = torch.tensor([1.0, data.draw(st.sampled_from(NOT_FINITE)), -2.0])
    found = expected.clone()
    assert set(judges(found, expected).values()) == {0.0}
    found[1] = data.draw(st.floats(-1e6, 1e6))
    assert set(judges(found, expected).values()) == {float("inf")}


def test_a_reference_of_no_numbers_at_all_proves_nothing() -> None:
    nothing = torch.full((3,), float("nan"))
    assert set(judges(nothing, nothing).values()) == {float("inf")}


def test_one_infinity_hides_no_other_difference() -> None:
    expected = torch.tensor([float("inf"), 1.0, 1.0])
    found = torch.tensor([float("inf"), 1.0, 2.0])
    assert min(judges(found, expected).values()) > 0.5


@given(st.floats(1e-12, 1e12), st.floats(0, 0.5))
def test_errors_do_not_depend_on_scale(scale: float, error: float) -> None:
    expected = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64) * scale
    found = expected * torch.tensor([1.0, 1.0, 1.0 + error], dtype=torch.float64)
    assert relative_error(found, expected) == pytest.approx(error, abs=1e-14)
    assert relative_error(found, expected, beside="element") == pytest.approx(error, abs=1e-14)
    assert relative_error(found, expected, beside="norm") == pytest.approx(error / 1.5, abs=1e-14)


def test_small_outputs_of_a_model_are_held_to_their_size() -> None:
    expected = torch.tensor([0.01, -0.02])
    assert counted_error(expected * 1.1, expected) == pytest.approx(0.1, rel=1e-4)


def test_differences_are_not_rounded_to_the_type_that_is_compared() -> None:
    found, expected = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001], dtype=torch.float32)
    assert relative_error(found, expected) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.ones(2), torch.ones(2, dtype=torch.long)),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), [torch.ones(2)]),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (None, torch.ones(1)),
        (2, 3),
    ],
)
def test_what_is_of_another_kind_is_no_match(found: object, expected: object) -> None:
    assert relative_error(found, expected) >= 1.0


def test_complex_values_and_empty_ones() -> None:
    value = torch.tensor([1 + 1j, 2 - 1j])
    assert relative_error(value, value) == 0.0
    assert relative_error(value.conj(), value) == pytest.approx(1.0)
    assert relative_error(torch.ones(0), torch.ones(0)) == 0.0


def test_nothing_else_divides_a_largest_difference_by_a_largest_value() -> None:
    own = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "comparison.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
                continue
            text = ast.unparse(node)
            if re.search(r" - .*\)\.abs\(\)\.(max|amax)\(", ast.unparse(node.left)) and "abs().max" in text:
                own.append(f"{path.name}: {text}")
    assert own == []
    assert math.isinf(relative_error(torch.tensor([float("nan")]), torch.tensor([0.0])))
