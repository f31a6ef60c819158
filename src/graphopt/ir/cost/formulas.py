"""FLOPs and bytes of every operator: the formula registered for it, or its operands' bytes and no FLOPs.

Constants per element follow LLM-Viewer (arXiv 2402.16363). Each call reads its operands from memory once
and writes its results once; what a compiler would fuse is not fused here.
"""

from __future__ import annotations

from ..operators.work import ACTIVATION_FLOPS, Call, Size, Work, moved, product
from . import fused as fused
from . import products as products
from .registry import formula, formula_of

_UNTAGGED = {
    "aten.square", "aten.clamp", "aten.where", "aten.masked_fill", "aten.bitwise_and",
    "aten.bitwise_or", "aten.bitwise_not", "aten.logical_not", "aten.floor_divide", "aten.rsub",
    "aten.isin", "aten.tril", "aten.triu", "aten.true_divide", "aten.dropout", "aten.addcmul",
    "aten.lerp",
}  # fmt: skip


def known(call: Call) -> bool:
    """Tell whether the operator has a formula of its own."""
    return formula_of(call.name) is not None or call.pointwise or call.name in _UNTAGGED


def work(call: Call) -> Work:
    """Return the FLOPs and bytes of a call: numbers if its sizes are numbers, expressions otherwise.

    An operator without a formula moves its operands and results and counts no FLOPs.
    """
    found = formula_of(call.name)
    if found is not None:
        return found(call)
    if known(call):
        return moved(call, call.output.numel)
    return moved(call)


@formula(
    "aten.silu", "aten.gelu", "aten.sigmoid", "aten.tanh", "aten.softplus", "aten.mish", "aten.elu",
    "aten.selu", "aten.celu", "aten.erf", "aten.log_sigmoid", "aten.softsign",
)  # fmt: skip
def activation(call: Call) -> Work:
    """FLOPs: 4 per element."""
    return moved(call, ACTIVATION_FLOPS * call.output.numel)


@formula(
    "aten.sum", "aten.mean", "aten.prod", "aten.max", "aten.min", "aten.amax", "aten.amin",
    "aten.argmax", "aten.argmin", "aten.cumsum", "aten.cumprod", "aten.any", "aten.all",
    "aten.logsumexp", "aten.topk", "aten.linalg_vector_norm", "aten.norm",
    "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d",
    "aten.adaptive_max_pool2d", "aten.logcumsumexp",
)  # fmt: skip
def reduction(call: Call) -> Work:
    """FLOPs: 1 per element read."""
    return moved(call, sum(operand.numel for operand in call.inputs))


@formula("aten.var", "aten.std", "aten.var_mean")
def variance(call: Call) -> Work:
    """FLOPs: 3 per element read: subtract, square, add."""
    return moved(call, 3 * call.inputs[0].numel)


@formula(
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.max_pool3d",
)
def pool(call: Call) -> Work:
    """FLOPs: 1 per element under the kernel."""
    dims = int(call.name[-2])
    given = call.arguments["kernel_size"]
    kernel = given if isinstance(given, tuple) else (given,)
    return moved(call, call.output.numel * product(kernel if len(kernel) == dims else kernel * dims))


@formula(
    "aten.cat", "aten.concat", "aten.stack", "aten.repeat", "aten.repeat_interleave", "aten.clone",
    "aten.contiguous", "aten.to", "aten._to_copy", "aten.type_as", "aten.pad",
    "aten.constant_pad_nd", "aten.roll", "aten.flip", "aten.scatter", "aten.scatter_add",
    "aten.slice_scatter", "aten.select_scatter", "aten.index_put", "aten.index_add",
    "aten.index_copy", "aten.sort", "aten.argsort", "aten.one_hot", "aten.reshape", "aten.view",
    "aten.flatten", "aten.unflatten", "aten.pixel_shuffle", "aten.pixel_unshuffle",
    "aten.masked_scatter",
)  # fmt: skip
def copy(call: Call) -> Work:
    """No FLOPs: operands are read and the result is written. Reshape copies only what was expanded."""
    return moved(call)


def _rows(call: Call, source: str) -> Work:
    """No FLOPs: of ``source`` only what is returned is read."""
    return moved(call, 0, {source: call.output.numel})


@formula("aten.embedding")
def embedding(call: Call) -> Work:
    """No FLOPs: of the table only the rows looked up are read."""
    return _rows(call, "weight")


@formula("aten.index", "aten.index_select", "aten.gather", "aten.take", "aten.take_along_dim")
def lookup(call: Call) -> Work:
    """No FLOPs: of the source only the elements returned are read."""
    return _rows(call, "self")


@formula(
    "aten.full", "aten.zeros", "aten.ones", "aten.arange", "aten.linspace", "aten.eye",
    "aten.scalar_tensor", "aten.full_like", "aten.zeros_like", "aten.ones_like", "aten.new_full",
    "aten.new_zeros", "aten.new_ones", "aten.rand", "aten.randn", "aten.rand_like",
    "aten.randn_like",
)  # fmt: skip
def creation(call: Call) -> Work:
    """No FLOPs: the result is written."""
    written: Size = sum(result.bytes for result in call.outputs)
    return Work(0, 0, written)


@formula("aten.empty", "aten.new_empty", "aten.empty_like")
def allocation(call: Call) -> Work:
    """Nothing is computed or moved."""
    return Work()
