"""FLOPs and bytes of every operator: the formula registered for it, or its operands' bytes and no FLOPs.

Constants per element follow LLM-Viewer (arXiv 2402.16363). Each call reads its operands from memory once
and writes its results once; what a compiler would fuse is not fused here.
"""

from __future__ import annotations

from ..operators.traits import Trait, named
from ..operators.work import ACTIVATION_FLOPS, Call, Size, Work, moved, product
from . import fused as fused
from . import products as products
from .registry import formula, formula_of

# one operation per entry, but not pointwise for sharding
_COMPARING = {"aten.isin", "aten.prelu", "aten.tril", "aten.triu"}


def known(call: Call) -> bool:
    """Tell whether the operator has a formula of its own."""
    return formula_of(call.name) is not None or call.pointwise or call.name in _COMPARING


def work(call: Call) -> Work:
    """Return the FLOPs and bytes of a call: numbers if its sizes are numbers, expressions otherwise.

    An operator without a formula moves its operands and results and counts no FLOPs.
    """
    registered = formula_of(call.name)
    if registered is not None:
        return registered(call)
    if known(call):
        return moved(call, call.output.numel)
    return moved(call)


@formula(*named(Trait.ACTIVATION))
def activation(call: Call) -> Work:
    """FLOPs: 4 per element."""
    return moved(call, ACTIVATION_FLOPS * call.output.numel)


@formula(
    *named(Trait.REDUCTION | Trait.SCAN) - {"aten.var", "aten.std"},
    "aten.topk", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d",
    "aten.adaptive_max_pool2d",
)  # fmt: skip
def reduction(call: Call) -> Work:
    """FLOPs: 1 per element read."""
    return moved(call, sum(operand.numel for operand in call.inputs))


@formula("aten.var", "aten.std", "aten.var_mean")
def variance(call: Call) -> Work:
    """FLOPs: 3 per element read: subtract, square, add."""
    return moved(call, 3 * call.inputs[0].numel)


@formula(*named(Trait.MEAN_POOLING | Trait.MAX_POOLING))
def pool(call: Call) -> Work:
    """FLOPs: 1 per element under the kernel."""
    dims = int(call.name[-2])
    kernel_size = call.arguments["kernel_size"]
    kernel = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    return moved(call, call.output.numel * product(kernel if len(kernel) == dims else kernel * dims))


@formula(
    *named(Trait.COPY | Trait.IDENTITY | Trait.CAST | Trait.PADDING | Trait.RESHAPE) - named(Trait.LOOKUP),
    "aten.scatter", "aten.scatter_add", "aten.slice_scatter", "aten.select_scatter", "aten.index_put",
    "aten.index_add", "aten.index_copy", "aten.sort", "aten.argsort", "aten.one_hot", "aten.masked_scatter",
)  # fmt: skip
def copy(call: Call) -> Work:
    """No FLOPs: operands are read and the result is written. Reshape copies only what was expanded."""
    return moved(call)


def _rows(call: Call, source: str) -> Work:
    """No FLOPs: only the returned elements of ``source`` are read."""
    return moved(call, 0, {source: call.output.numel})


@formula("aten.embedding")
def embedding(call: Call) -> Work:
    """No FLOPs: only the rows looked up are read from the table."""
    return _rows(call, "weight")


@formula(*named(Trait.LOOKUP) - {"aten.embedding"})
def lookup(call: Call) -> Work:
    """No FLOPs: only the elements returned are read from the source."""
    return _rows(call, "self")


@formula(*named(Trait.FACTORY))
def creation(call: Call) -> Work:
    """No FLOPs: the result is written."""
    written: Size = sum(result.bytes for result in call.outputs)
    return Work(0, 0, written)


@formula(*named(Trait.EMPTY))
def allocation(call: Call) -> Work:
    """Nothing is computed or moved."""
    return Work()
