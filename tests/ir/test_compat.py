"""The private names of torch that graphopt leans on; a failure here says which one moved."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import graphopt
from graphopt.ir import compat


def test_symbols_have_range_and_hint() -> None:
    mode = compat.new_fake_mode()
    symbol = compat.add_symbol(mode, "batch", 1, 64, 3)
    size = compat.symint(mode, symbol, 3)
    assert isinstance(size, torch.SymInt)
    assert compat.symbol_range(mode, symbol)[1:] == (64, 3), "var_to_range or backed_var_to_val moved"
    assert compat.symint(mode, symbol - symbol, 0) == 0


def test_fake_modes_are_made_without_a_cache() -> None:
    """Wrong if the setting moved: small captures would take half as long again."""
    with compat.without_fake_cache():
        assert not compat.FakeTensorMode().cache_enabled
    assert compat.FakeTensorMode().cache_enabled
    assert not compat.new_fake_mode().cache_enabled


def test_fake_tensors_carry_symbols_through_operators() -> None:
    mode = compat.new_fake_mode()
    size = compat.symint(mode, compat.add_symbol(mode, "n", 1, None, 5), 5)
    value = compat.fake_tensor(mode, (size, 4), torch.float32)
    assert isinstance(value, FakeTensor)
    with mode:
        product = torch.nn.functional.linear(value, compat.fake_tensor(mode, (7, 4), torch.float32))
    assert str(product.shape[0]) == "n"
    assert product.shape[1] == 7


def test_looking_at_sizes_leaves_them_as_wide_as_they_were() -> None:
    """Wrong if the tables that answers are written to moved, or kernels of fixed sizes are chosen again."""
    mode = compat.new_fake_mode()
    symbol = compat.add_symbol(mode, "n", 1, None, 5)
    value = compat.fake_tensor(mode, (2, 3, compat.symint(mode, symbol, 5)), torch.float32)
    before = compat.symbol_range(mode, symbol)
    with mode, compat.symbolic_kernels(), compat.without_guards(mode):
        padded = torch.ops.aten.constant_pad_nd.default(value, [1, 0])
        assert value.shape[2] < 64
    assert str(padded.shape[2]) in ("n + 1", "1 + n"), "padding gave a fixed size"
    assert compat.symbol_range(mode, symbol) == before


def test_answers_about_sizes_are_forgotten() -> None:
    """Wrong if a size that was looked at stood as a number, or what was answered once were answered again."""
    mode = compat.new_fake_mode()
    symbol = compat.add_symbol(mode, "n", 1, None, 5)
    size = compat.symint(mode, symbol, 5)
    doubled = size * 2
    value = compat.fake_tensor(mode, (2, size), torch.float32)
    with compat.without_guards(mode):
        assert int(value.shape[1]) == int(size) == 5
        assert doubled % 5 == 0
        assert doubled != 12
    assert (str(value.shape), str(size), str(doubled)) == ("torch.Size([2, n])", "n", "2*n")
    assert str(doubled // 5) == "((2*n)//5)"
    with mode:
        assert str((value + 1).shape) == "torch.Size([2, n])"
    with compat.refusing_guards(mode):
        for ask in (lambda: int(size), lambda: bool(doubled == 12), lambda: bool(doubled % 5 == 0)):
            with pytest.raises(graphopt.VerificationError, match="sizes in it vary"):
                ask()
    assert mode.shape_env.guards == []


def test_questions_about_sizes_are_refused_where_they_must_not_be_asked() -> None:
    """Wrong if the place that torch asks before it adds a guard moved."""
    mode = compat.new_fake_mode()
    size = compat.symint(mode, compat.add_symbol(mode, "n", 2, None, 5), 5)
    with compat.refusing_guards(mode):
        assert size >= 2, "the range says so"
        with compat.without_guards(mode):
            assert size == 5
        for ask in (
            lambda: float(size),
            lambda: range(size),
            lambda: [0] * size,
            lambda: max(size, 7),
            lambda: size == 5 or None,
            lambda: size in (5, 6),
        ):
            with pytest.raises(graphopt.VerificationError, match="n"):
                ask()
    assert size == 5


def test_plain_tensors_are_told_from_traced_ones() -> None:
    mode = compat.new_fake_mode()
    assert compat.is_plain_tensor(torch.ones(2))
    assert not compat.is_plain_tensor(compat.fake_tensor(mode, (2,), torch.float32))


def test_exported_programs_can_be_built() -> None:
    program = graphopt.capture(torch.nn.Linear(3, 2), torch.randn(4, 3))
    exported = program.exported_program()
    x = torch.randn(6, 3)
    assert torch.allclose(exported.module()(input=x)["output"], program(x), atol=1e-6)


def test_tracing_of_conversions() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda a, b: [torch.cat([a, b])])(torch.ones(2), torch.ones(3))
    assert any("cat" in str(node.target) for node in traced.graph.nodes)


def test_transformers_conversion_tables_are_where_we_read_them() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    assert all(
        (get_model_conversion_mapping, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key)
    )


def test_tracing_is_noticed() -> None:
    """An operator that looks at values would write what it saw into the graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from graphopt.ir.compat import is_plain_tensor

    seen = []
    make_fx(lambda x: seen.append(is_plain_tensor(x)) or x + 1)(torch.ones(2))
    torch.compile(lambda x: seen.append(is_plain_tensor(x)) or x + 1, backend="eager")(torch.ones(2))
    assert seen == [False, False]
    assert is_plain_tensor(torch.ones(2))


def test_what_becomes_a_graph_is_known() -> None:
    """Wrong if the exporter's passes could not be told from those that record: nodes would be lost."""
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.is_recorded())
        return x + 1

    function(torch.ones(2))
    make_fx(function)(torch.ones(2))
    assert seen == [False, True]


def test_the_exporter_to_onnx_is_spared_its_tables_and_values() -> None:
    """Wrong if what is replaced for the time of an export moved: files would take five times as long."""
    pytest.importorskip("onnxscript")
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

    before = vars(ONNXRegistry)["from_torchlib"], _TypePromotionInterpreter.run_node
    mode = compat.new_fake_mode()
    with compat.quick_onnx_export(mode, [compat.add_symbol(mode, "n", 1, None, 5)]):
        one, other = (ONNXRegistry.from_torchlib(opset_version=20) for _ in range(2))
        assert (one.functions, one.opset_version) == (other.functions, 20)
        target, metas = next(iter(one.functions.items()))
        assert metas is not other.functions[target], "one export's own translations would be in the next"
        assert metas[0] is other.functions[target][0], "the table was made again"
        assert _TypePromotionInterpreter.run_node is not before[1]
    assert (vars(ONNXRegistry)["from_torchlib"], _TypePromotionInterpreter.run_node) == before


def test_libraries_believe_that_they_are_exported() -> None:
    """Wrong if the switch moved: a recorded run would take other branches than the export that follows it."""
    assert not torch.compiler.is_exporting()
    with compat.exporting():
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_exporting()
