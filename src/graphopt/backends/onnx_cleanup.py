"""An ONNX graph made small: weights attached late, constants folded, equal nodes shared."""

from __future__ import annotations

from typing import Any

from ..ir.errors import LoweringError
from ..ir.weights import TensorSource, Weight

EAGER_BYTES = 1 << 16
"""Weights up to this size are read at once, so that what depends on them can be folded."""
_FOLDED_VALUES = 1 << 24


def attach_weights(model: Any, weights: dict[str, Weight]) -> None:
    """Give the graph its weights: small ones at once, others read each time they are asked for."""
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
    late.meta["source"] = source
    return late


def _is_late(value: Any) -> bool:
    return value is not None and value.const_value is not None and "source" in value.const_value.meta


def simplify(model: Any) -> None:
    """Fold, share and drop nodes in place; sizes are inferred and provenance is removed at the end."""
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
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
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

    rules = [
        common.fuse_batchnorm_into_conv_rule,
        common.fuse_batchnorm_into_conv_transpose_rule,
        common.fuse_batchnorm_into_gemm_rule,
    ]
    rewriter.rewrite(model, pattern_rewrite_rules=rules)


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
