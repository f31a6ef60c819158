"""Clean-up of an ONNX graph: weights are attached late, constants folded and equal nodes shared."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from ...ir.errors import LoweringError
from ...ir.weights import TensorSource, Weight
from .few_bits import LOOKUP

EAGER_BYTES = 1 << 16
"""Bytes up to which a weight is read at once, so that nodes that depend on it can be folded."""
_FOLDED_VALUES = 1 << 24


def attach_weights(model: Any, weights: dict[str, Weight]) -> None:
    """Attach the weights to the graph: small ones immediately, others as tensors that are read on demand.

    A weight that is only read transposed is stored transposed, under the same name.
    """
    for name, value in model.graph.initializers.items():
        weight = weights.get(name)
        if weight is None:
            raise LoweringError(f"the exporter made a weight {name!r} that the program does not have")
        order = _transposed_order(value)
        value.const_value = _tensor(weight, name, order)
        if order is not None:
            value.shape = value.const_value.shape
            for use in list(value.uses()):
                use.node.outputs[0].replace_all_uses_with(value)
                model.graph.remove(use.node, safe=True)


def _transposed_order(value: Any) -> list[int] | None:
    """Return the one permutation that all readers of a weight apply to it, or None."""
    orders = set()
    for use in value.uses():
        node = use.node
        if node.op_type != "Transpose" or "perm" not in node.attributes or node.outputs[0].is_graph_output():
            return None
        orders.add(tuple(node.attributes["perm"].as_ints()))
    return list(orders.pop()) if len(orders) == 1 else None


def _tensor(weight: Weight, name: str, order: list[int] | None) -> Any:
    """Return a weight as a tensor of the graph, permuted."""
    import onnx_ir
    from onnx_ir import tensor_adapters

    source: TensorSource = weight.source

    def load() -> Any:
        tensor = source.load()
        if order is not None:
            tensor = tensor.permute(order)
        return tensor_adapters.TorchTensor(tensor.contiguous(), name=name)

    if weight.bytes <= EAGER_BYTES:
        return load()
    shape = [source.shape[i] for i in order] if order is not None else list(source.shape)
    kind = tensor_adapters.from_torch_dtype(source.dtype)
    return onnx_ir.LazyTensor(load, dtype=kind, shape=onnx_ir.Shape(shape), name=name)


def _is_late(value: Any) -> bool:
    import onnx_ir

    return value is not None and isinstance(value.const_value, onnx_ir.LazyTensor)


def _stays(node: Any) -> bool:
    """Return whether a node defines how a value is stored, or reads a weight that is not attached yet."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") or any(_is_late(v) for v in node.inputs):
        return True
    # the words of a table are read in two shapes, and stored in one
    return node.op_type == "Reshape" and any(use.node.op_type == LOOKUP for use in node.outputs[0].uses())


def simplify(model: Any) -> None:
    """Fold, share and drop nodes in place, then infer sizes and remove provenance."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.RemoveUnusedNodesPass()(model)
    with _quiet():
        optimizer.fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=_FOLDED_VALUES,
            output_size_limit=_FOLDED_VALUES,
            should_fold=lambda node: False if _stays(node) else None,
        )
    if any(node.op_type == "BatchNormalization" for node in model.graph):
        _fold_batch_norms(model)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(size_limit=4096),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.ShapeInferencePass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about nodes that are not folded and about values that are discarded later."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logger.setLevel(before)


def _fold_batch_norms(model: Any) -> None:
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common

    rules = [
        common.fuse_batchnorm_into_conv_rule,
        common.fuse_batchnorm_into_conv_transpose_rule,
        common.fuse_batchnorm_into_gemm_rule,
    ]
    rewriter.rewrite(model, pattern_rewrite_rules=rules)
