"""Which operators have which traits: one table of ATen's, beside what operators of ours say of themselves.

A table that leaves an operator out by mistake makes a pass stop there, and one that has it by mistake makes a wrong
program; so whoever looks through operators asks for traits here and keeps no list of its own. Which operators a pass
takes stays with the pass. Spellings that canonicalisation takes out of every graph (``view``, ``transpose``) are absent.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import fx
from torch._ops import OpOverload

from ..schema import operator_name
from .spec import SPECS, Trait

_ATEN: dict[Trait, str] = {
    Trait.RESHAPE: "flatten reshape squeeze unflatten unsqueeze",
    Trait.REORDER: "permute",
    Trait.REPEAT: "broadcast_to expand expand_as",
    Trait.PART: "as_strided chunk diagonal narrow select slice split split_with_sizes tensor_split unbind unfold",
    # copies are left beside as_strided alone, detach in the forms that recipes train
    Trait.IDENTITY: "clone contiguous detach",
    Trait.COPY: "cat constant_pad_nd flip gather index index_select pixel_shuffle pixel_unshuffle repeat repeat_interleave "
    "roll stack",
    # canonicalisation leaves of view what names a type
    Trait.BITS: "view view_as_complex view_as_real",
    Trait.CAST: "to",
    Trait.PADDING: "constant_pad_nd pad",
    Trait.LOOKUP: "embedding gather index index_select take take_along_dim",
    # torch tags the others; of some it tags one overload only
    Trait.POINTWISE: "dropout floor_divide hardswish log_sigmoid masked_fill rsub where",
    Trait.ACTIVATION: "celu elu erf gelu log_sigmoid mish selu sigmoid silu softplus tanh",
    Trait.HOMOGENEOUS: "abs avg_pool1d avg_pool2d avg_pool3d leaky_relu max_pool1d max_pool2d max_pool3d relu",
    Trait.LINEAR: "avg_pool1d avg_pool2d avg_pool3d cumsum mean neg sum",
    Trait.CONVOLUTION: "conv1d conv2d conv3d",
    # what canonicalisation leaves of the general operator is transposed
    Trait.TRANSPOSED: "conv_transpose1d conv_transpose2d conv_transpose3d convolution",
    Trait.PRODUCT: "_grouped_mm _int_mm baddbmm bmm einsum matmul mm",
    Trait.MEAN_POOLING: "avg_pool1d avg_pool2d avg_pool3d",
    Trait.MAX_POOLING: "max_pool1d max_pool2d max_pool3d",
    Trait.NORM: "batch_norm group_norm instance_norm layer_norm rms_norm",
    Trait.SOFTMAX: "_log_softmax _softmax log_softmax softmax",
    Trait.REDUCTION: "all amax amin any argmax argmin linalg_vector_norm logsumexp max mean min norm prod std sum var",
    Trait.SCAN: "cumprod cumsum logcumsumexp",
    Trait.ALONG: "_log_softmax _softmax all amax amin any argmax argmin cat cumprod cumsum flip index_select log_softmax "
    "logcumsumexp logsumexp mean narrow prod roll slice softmax std sum var",
    Trait.MIXING: "_grouped_mm _int_mm avg_pool1d avg_pool2d avg_pool3d baddbmm bmm conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d convolution einsum linear matmul mm scaled_dot_product_attention",
    Trait.FACTORY: "arange eye full full_like linspace new_full new_ones new_zeros ones ones_like rand rand_like randint "
    "randn randn_like scalar_tensor zeros zeros_like",
    Trait.FILL: "full full_like new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like",
    Trait.NEW: "new_empty new_full new_ones new_zeros",
    Trait.EMPTY: "empty empty_like empty_strided new_empty new_empty_strided",
}


def _by_name() -> dict[str, int]:
    # a list that an operator returns is taken apart by Python's own
    found = {"getitem": Trait.PART.value}
    for trait, names in _ATEN.items():
        for name in names.split():
            found[f"aten.{name}"] = found.get(f"aten.{name}", 0) | trait.value
    return found


_BITS = _by_name()


@lru_cache(maxsize=4096)
def _bits(target: object) -> int:
    name = operator_name(target)
    spec = SPECS.get(name)
    bits = _BITS.get(name, 0) if spec is None else spec.traits.value
    if isinstance(target, OpOverload):
        for tag, trait in _TAGS:
            bits |= trait.value if tag in target.tags else 0
    return bits


_TAGS = ((torch.Tag.pointwise, Trait.POINTWISE), (torch.Tag.nondeterministic_seeded, Trait.RANDOM))


def traits_of(target: object) -> Trait:
    """Return all traits of an operator.

    Args:
        target: what a node calls, or an operator's name. Torch's tags are known of what a node calls alone.
    """
    return Trait(_bits(target))


def has(node: object, trait: Trait) -> bool:
    """Tell whether a value is the result of an operator that has this trait, or one of several joined by ``|``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and bool(_bits(node.target) & trait.value)


def named(trait: Trait) -> frozenset[str]:
    """Return the names of the operators that have a trait, or one of several; torch's tags are left out."""
    own = {name for name, spec in SPECS.items() if spec.traits & trait}
    return frozenset(own | {name for name, bits in _BITS.items() if bits & trait.value})


__all__ = ["Trait", "has", "named", "traits_of"]
