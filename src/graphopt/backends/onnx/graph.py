"""Translation of a program to an ONNX graph in memory: torch's exporter, followed by folding and renaming."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ...ir import operators
from ...ir.compat import FakeTensor, is_recorded, quick_onnx_export, quiet_onnx_registration
from ...ir.errors import GraphoptError, LoweringError
from ...ir.operators.library import KERNELS
from ...ir.program import Program
from ...ir.running.fold import fold
from ...ir.schema import arguments, is_operator, operator_name
from ...ir.weights import Weight
from ..torch.exported import exported_program
from .cleanup import attach_weights, simplify
from .operators import QUANTIZED_FROM, translation_table
from .quantized import pairs_in, require_quantized, store_weights, with_integers
from .runtime_operators import drop_unused_outputs


def build_graph(program: Program, opset: int, kernels: bool = False) -> Any:
    """Return the program as an ``onnx_ir.Model`` whose large weights are read only when it is written.

    Args:
        program: not changed.
        opset: of the graph.
        kernels: it holds operators that ONNX Runtime has beside the standard's, and may use more of them.

    Raises:
        LoweringError: an operator has no translation, or two names collide.
    """
    if pairs_in(program) and opset < QUANTIZED_FROM:
        raise LoweringError(
            f"quantised programs are written at opset {QUANTIZED_FROM} or later, not {opset}",
            hint="opset=23 has attention and norms as single operators, and is their default",
        )
    model, weights = _translate(written_out(fold(with_integers(program)), opset), opset, kernels)
    attach_weights(model, weights)
    simplify(model)
    drop_unused_outputs(model)
    expected = pairs_in(program)
    if expected:
        store_weights(model)
        require_quantized(model, expected, {n for n, w in weights.items() if w.kind == "parameter"})
    _rename(model, [*program.signature.inputs, *program.dials], program.signature.output_names)
    _require_dynamic(model, program)
    model.producer_name, model.producer_version = "graphopt", None
    model.graph.name = "graphopt"
    return model


def written_out(program: Program, opset: int) -> Program:
    """Return the program with graphopt operators that have no translation replaced by their definition.

    For a single such operator the exporter decomposes the whole graph, which takes nine tenths of the export. An
    operator that cannot be replaced here is left to the exporter.

    Args:
        program: not changed.
        opset: of the graph.
    """
    translations = translation_table(opset)

    def untranslated(program: Program) -> list[fx.Node]:
        return [
            n
            for n in program.graph.nodes
            if _reference(n) is not None and (n.target not in translations or _convolves_a_tree(n))
        ]

    if not untranslated(program):
        return program
    lowered = program.copy()
    # a definition may contain another such operator
    while sum(_write_out(lowered, node) for node in untranslated(lowered)):
        pass
    # nor may it compute anything from weights alone
    return fold(lowered)


def _convolves_a_tree(node: fx.Node) -> bool:
    """Return whether a convolution gathers the ancestors of each token, for which no operator stands."""
    return is_operator(node, "graphopt.causal_conv1d") and arguments(node)["step_mask"] is not None


def _reference(node: fx.Node) -> Callable[..., Any] | None:
    """Return the function that defines an operator of graphopt."""
    library, _, name = operator_name(node.target).partition(".")
    called = node.op == "call_function" and library == "graphopt" and name in operators.COMPOSITES
    return getattr(operators, name, None) if called else None


def _write_out(program: Program, node: fx.Node) -> bool:
    reference = _reference(node)
    assert reference is not None
    users = list(node.users)
    try:
        with program.edit.before(node):
            value = program.edit.emit(partial(reference, **node.kwargs), *node.args)
        if isinstance(value, fx.Node):
            program.edit.replace(node, value)
        else:
            for user in users:
                program.edit.replace(user, value[user.args[1]])
    except GraphoptError:
        return False
    return True


def _translate(program: Program, opset: int, kernels: bool) -> tuple[Any, dict[str, Weight]]:
    exported = _exported(program)
    weights = {
        str(spec.target): program.weights[spec.arg.name]
        for spec in exported.graph_signature.input_specs
        if spec.target is not None
    }
    try:
        try:
            return _export(program, _undecomposed(exported), opset, kernels), weights
        except torch.onnx.OnnxExporterError:
            # an operator that only the exporter can decompose
            return _export(program, _exported(program), opset, kernels), weights
    except torch.onnx.OnnxExporterError as error:
        raise LoweringError(
            f"the program has no ONNX form at opset {opset}: {_cause(error)}",
            hint="program.operators lists its operators, for those that ONNX lacks; "
            "fixed sizes (sizes=) go through where dynamic ones may not",
        ) from error


def _exported(program: Program) -> ExportedProgram:
    exported = exported_program(program, load=False)
    for node in exported.graph.nodes:
        # the file gets no provenance, and the exporter warns about nodes that have none
        node.meta = {"val": node.meta["val"], "nn_module_stack": {}}
    return exported


def _cause(error: BaseException) -> str:
    """Return the first line of the root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error.args[0] if error.args else error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


@contextlib.contextmanager
def _roundings_by_shape() -> Iterator[None]:
    """Give the exporter's passes, which infer the value of each rounding several times, only its shape.

    Inferred from symbolic sizes step by step, these values take two thirds of the export of a quantised program.
    """

    def shape_alone(x: Any, *others: Any, **options: Any) -> torch.Tensor | None:
        return torch.empty_like(x) if isinstance(x, FakeTensor) and not is_recorded() else None

    before = dict(KERNELS)
    KERNELS.update(fake_quantize=shape_alone, fake_quantize_channels=shape_alone)
    try:
        yield
    finally:
        KERNELS.clear()
        KERNELS.update(before)


def _export(program: Program, exported: ExportedProgram, opset: int, kernels: bool) -> Any:
    with (
        quiet_onnx_registration(),
        quick_onnx_export(program.mode, program.symbols),
        _roundings_by_shape(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        exported_model = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=False,
            custom_translation_table=translation_table(opset, kernels),
        )
    assert exported_model is not None
    return exported_model.model


def _undecomposed(exported: ExportedProgram) -> ExportedProgram:
    """Let the exporter skip its decomposition if that would change nothing: it is most of the exporter's time.

    The exporter passes the table of operators that it cannot translate.
    """
    decompose: Callable[..., ExportedProgram] = exported.run_decompositions

    def run(table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        calls = (node.target for node in exported.graph.nodes if node.op == "call_function")
        if table is None or any(target in table for target in calls):
            return decompose(table, *args, **kwargs)
        return exported

    vars(exported)["run_decompositions"] = run
    return exported


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs the program's names; an inner value with one of these names is renamed."""
    graph = model.graph
    names = [*inputs, *outputs]
    clash = {name for name in names if names.count(name) > 1} | (set(names) & set(graph.initializers))
    if clash:
        raise LoweringError(
            f"ONNX needs distinct names, and the program uses {', '.join(sorted(clash))} twice",
            hint="rename the output or the weight",
        )
    ends = [*graph.inputs, *graph.outputs]
    if len(ends) != len(names):
        raise LoweringError(f"the exporter kept {len(ends)} inputs and outputs of {len(names)}")
    used = set(names)
    for node in graph:
        for value in node.outputs:
            if value.name in used:
                value.name = f"{value.name}_inner"
    for value, name in zip(ends, names, strict=True):
        value.name = name


def _require_dynamic(model: Any, program: Program) -> None:
    """Raise an error if the exporter fixed a size that should vary."""
    for value in model.graph.inputs:
        if value.name not in program.signature.inputs:
            continue
        for size, expected in zip(value.shape, program.signature.inputs[value.name].shape, strict=True):
            if isinstance(size, int) and not isinstance(expected, int):
                raise LoweringError(
                    f"the exporter fixed {expected} of input {value.name!r} at {size}",
                    hint="capture with another example size, or write a static graph with sizes=",
                )
