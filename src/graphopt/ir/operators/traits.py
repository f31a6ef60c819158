"""The traits of operators: one table for ATen, and the specs of graphopt's operator set.

A missing entry makes a pass stop at an operator, and a wrong entry makes a wrong program; so code that looks through
operators asks for traits here and keeps no list of its own. Which operators a pass rewrites is defined by the pass.
Spellings that canonicalisation removes from every graph (``view``, ``transpose``) are absent.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import fx
from torch._ops import OpOverload

from ..schema import operator_name
from .spec import SPECS, Trait

T = Trait
# every operator once, with all of its traits
_ATEN: tuple[tuple[Trait, str], ...] = (
    (T.RESHAPE, "flatten reshape squeeze unflatten unsqueeze"),
    (T.REORDER, "permute"),
    (T.REPEAT, "broadcast_to expand expand_as"),
    (T.PART, "as_strided chunk diagonal select split split_with_sizes tensor_split unbind unfold"),
    (T.PART | T.ALONG, "narrow slice"),
    # copies remain only in graphs with as_strided, detach only in programs that recipes train
    (T.IDENTITY, "clone contiguous detach"),
    (T.COPY | T.ALONG, "cat flip roll"),
    (T.COPY | T.PADDING, "constant_pad_nd"),
    (T.COPY | T.LOOKUP, "gather index"),
    (T.COPY | T.LOOKUP | T.ALONG, "index_select"),
    (T.COPY, "pixel_shuffle pixel_unshuffle repeat repeat_interleave stack"),
    # canonicalisation keeps only the overload of view that takes a type
    (T.BITS, "view view_as_complex view_as_real"),
    (T.CAST, "to"),
    (T.PADDING, "pad"),
    (T.LOOKUP, "embedding take take_along_dim"),
    # torch tags the others; of these it tags one overload only, or none
    (T.POINTWISE, "dropout floor_divide hardswish masked_fill rsub where"),
    (T.POINTWISE | T.ACTIVATION, "log_sigmoid"),
    (T.ACTIVATION, "celu elu erf gelu mish selu sigmoid silu softplus tanh"),
    (T.HOMOGENEOUS, "abs leaky_relu relu"),
    (T.HOMOGENEOUS | T.LINEAR | T.MEAN_POOLING | T.MIXING, "avg_pool1d avg_pool2d avg_pool3d"),
    (T.HOMOGENEOUS | T.MAX_POOLING, "max_pool1d max_pool2d max_pool3d"),
    (T.LINEAR | T.SCAN | T.ALONG, "cumsum"),
    (T.LINEAR | T.REDUCTION | T.ALONG, "mean sum"),
    (T.LINEAR, "neg"),
    (T.CONVOLUTION | T.MIXING, "conv1d conv2d conv3d"),
    # after canonicalisation the general operator is always transposed
    (T.TRANSPOSED | T.MIXING, "conv_transpose1d conv_transpose2d conv_transpose3d convolution"),
    (T.PRODUCT | T.MIXING, "_grouped_mm _int_mm baddbmm bmm einsum matmul mm"),
    (T.NORM, "batch_norm group_norm instance_norm layer_norm rms_norm"),
    (T.SOFTMAX | T.ALONG, "_log_softmax _softmax log_softmax softmax"),
    (T.REDUCTION | T.ALONG, "all amax amin any argmax argmin linalg_vector_norm logsumexp norm prod std var"),
    (T.REDUCTION, "max min"),
    (T.SCAN | T.ALONG, "cumprod logcumsumexp"),
    (T.MIXING, "linear scaled_dot_product_attention"),
    (T.FACTORY, "arange eye linspace rand rand_like randint randn randn_like"),
    (T.FACTORY | T.FILL, "full full_like ones ones_like scalar_tensor zeros zeros_like"),
    (T.FACTORY | T.FILL | T.NEW, "new_full new_ones new_zeros"),
    (T.NEW | T.EMPTY, "new_empty"),
    (T.EMPTY, "empty empty_like empty_strided new_empty_strided"),
)


def _by_name() -> dict[str, int]:
    # the results of an operator that returns a list are read by Python's getitem
    bits = {"getitem": Trait.PART.value}
    for traits, names in _ATEN:
        bits |= dict.fromkeys((f"aten.{name}" for name in names.split()), traits.value)
    return bits


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
        target: what a node calls, or an operator's name. Torch's tags are known only for what a node calls.
    """
    return Trait(_bits(target))


def has(node: object, trait: Trait) -> bool:
    """Tell whether a value is the result of an operator with this trait, or with any of several joined by ``|``."""
    return (
        isinstance(node, fx.Node) and node.op == "call_function" and bool(_bits(node.target) & trait._value_)
    )


def named(trait: Trait) -> frozenset[str]:
    """Return the names of the operators with a trait, or with any of several; torch's tags are not considered."""
    specified = {name for name, spec in SPECS.items() if spec.traits & trait}
    return frozenset(specified | {name for name, bits in _BITS.items() if bits & trait.value})


__all__ = ["Trait", "has", "named", "traits_of"]
