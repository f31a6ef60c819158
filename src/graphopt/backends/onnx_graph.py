"""From a Program to an ONNX graph in memory: the exporter's translation, folded and named by us."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

from ..ir.compat import quiet_onnx_registration
from ..ir.errors import LoweringError
from ..ir.fold import fold
from ..ir.program import Program
from ..ir.weights import TensorSource, Weight
from .exported import exported_program
from .onnx_operators import translation_table

EAGER_BYTES = 1 << 16
"""Weights up to this size are read at once, so that what depends on them can be folded."""
_FOLDED_VALUES = 1 << 24


def build_graph(program: Program, opset: int) -> Any:
    """Return the program as an ``onnx_ir.Model`` whose large weights are read when it is written.

    Args:
        program: not changed.
        opset: of the graph.

    Raises:
        LoweringError: an operator has no translation, or two names collide.
    """
    model, weights = _translate(fold(program), opset)
    _attach_weights(model, weights)
    _simplify(model)
    _rename(model, [*program.signature.inputs, *program.dials], program.signature.output_names)
    model.producer_name, model.producer_version = "graphopt", None
    model.graph.name = "graphopt"
    return model


def _translate(program: Program, opset: int) -> tuple[Any, dict[str, Weight]]:
    exported = exported_program(program, load=False)
    weights = {
        str(spec.target): program.weights[spec.arg.name]
        for spec in exported.graph_signature.input_specs
        if spec.target is not None
    }
    try:
        return _export(_undecomposed(exported), opset), weights
    except torch.onnx.OnnxExporterError:
        # an operator that only the exporter's own decomposition knows
        pass
    try:
        return _export(exported_program(program, load=False), opset), weights
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(cause).strip() or type(cause).__name__
        raise LoweringError(
            f"the program has no ONNX form at opset {opset}: {text.splitlines()[0]}",
            hint="program.operators lists its operators; rewrite those that ONNX lacks",
        ) from error


def _export(exported: ExportedProgram, opset: int) -> Any:
    with quiet_onnx_registration(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=False,
            custom_translation_table=translation_table(opset),
        )
    assert written is not None
    return written.model


def _undecomposed(exported: ExportedProgram) -> ExportedProgram:
    """Let the exporter skip its decomposition where it would change nothing: it is most of its time.

    The exporter hands over the table of operators it cannot write.
    """
    decompose: Callable[..., ExportedProgram] = exported.run_decompositions

    def run(table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        calls = (node.target for node in exported.graph.nodes if node.op == "call_function")
        if table is None or any(target in table for target in calls):
            return decompose(table, *args, **kwargs)
        return exported

    exported.run_decompositions = run  # type: ignore[method-assign]
    return exported


# -- weights ----------------------------------------------------------------------------------------


def _attach_weights(model: Any, weights: dict[str, Weight]) -> None:
    from onnx_ir import tensor_adapters

    for name, value in model.graph.initializers.items():
        weight = weights.get(name)
        if weight is None:
            raise LoweringError(f"the exporter made a weight {name!r} that the program does not have")
        if weight.bytes <= EAGER_BYTES:
            value.const_value = tensor_adapters.TorchTensor(weight.source.load().contiguous(), name=name)
        else:
            value.const_value = _late(weight.source, name)


def _late(source: TensorSource, name: str, permutation: list[int] | None = None) -> Any:
    """Return a tensor that is read from ``source``, and permuted, each time it is asked for."""
    import onnx_ir
    from onnx_ir import tensor_adapters

    def read() -> Any:
        tensor = source.load()
        if permutation is not None:
            tensor = tensor.permute(permutation)
        return tensor_adapters.TorchTensor(tensor.contiguous(), name=name)

    shape = list(source.shape)
    if permutation is not None:
        shape = [shape[i] for i in permutation]
    late = onnx_ir.LazyTensor(
        read, dtype=tensor_adapters.from_torch_dtype(source.dtype), shape=onnx_ir.Shape(shape), name=name
    )
    late.metadata_props["graphopt.late"] = "1"
    late.meta["source"] = source
    return late


def _is_late(value: Any) -> bool:
    return value is not None and value.const_value is not None and "source" in value.const_value.meta


def _transpose_weights(model: Any) -> None:
    """Store a weight that is only read transposed as its transpose."""
    for value in list(model.graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if not _is_late(value) or any(node.op_type != "Transpose" for node in readers):
            continue
        orders = {tuple(node.attributes["perm"].as_ints()) for node in readers if "perm" in node.attributes}
        if len(orders) != 1 or len(readers) == 0:
            continue
        order = list(next(iter(orders)))
        value.const_value = _late(value.const_value.meta["source"], value.name, order)
        value.shape = value.const_value.shape
        for node in readers:
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)


# -- clean-up ---------------------------------------------------------------------------------------


def _simplify(model: Any) -> None:
    from onnx_ir.passes import common
    from onnxscript import optimizer

    _transpose_weights(model)
    common.RemoveUnusedNodesPass()(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_FOLDED_VALUES,
        output_size_limit=_FOLDED_VALUES,
        should_fold=lambda node: False if any(_is_late(value) for value in node.inputs) else None,
    )
    if any(node.op_type == "BatchNormalization" for node in model.graph):
        _fold_batch_norms(model)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(size_limit=4096),
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.ShapeInferencePass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)


def _fold_batch_norms(model: Any) -> None:
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common

    rewriter.rewrite(model, pattern_rewrite_rules=common.fuse_batchnorm_rule_set())


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs the program's names; a value inside that has one of them gets another."""
    graph = model.graph
    wanted = [*inputs, *outputs]
    clash = {name for name in wanted if wanted.count(name) > 1} | (set(wanted) & set(graph.initializers))
    if clash:
        raise LoweringError(
            f"ONNX needs distinct names, and the program uses {', '.join(sorted(clash))} twice",
            hint="rename the output or the weight",
        )
    ends = [*graph.inputs, *graph.outputs]
    if len(ends) != len(wanted):
        raise LoweringError(f"the exporter kept {len(ends)} inputs and outputs of {len(wanted)}")
    taken = set(wanted)
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for value, name in zip(ends, wanted, strict=True):
        value.name = name
