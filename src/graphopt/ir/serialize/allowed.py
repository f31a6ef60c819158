"""The operators that a saved program may call, listed one by one.

Everything here computes a value from its arguments and does nothing else. A namespace would not do as a
list: ``aten`` alone has operators that write and read files.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..errors import CheckpointError
from ..operators import DIALECT

_ATEN = """
abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr all amax amin aminmax any arange argmax
argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli
bilinear bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
broadcast_to bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone col2im
complex concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d convolution copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod
cumsum deg2rad diag diag_embed diagonal diagonal_scatter diff digamma dist div dot dropout einsum elu
embedding embedding_bag empty eq erf erfc erfinv exp exp2 expand expand_as expm1 eye
fake_quantize_per_channel_affine fake_quantize_per_tensor_affine fft_fft fft_fft2 fft_fftn fft_ifft
fft_ifft2 fft_irfft fft_irfft2 fft_rfft fft_rfft2 flatten flip floor floor_divide fmod frac frobenius_norm
full full_like gather ge gelu ger glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gt
hardshrink hardsigmoid hardswish hardtanh heaviside histc hypot im2col index index_add index_copy index_fill
index_put index_select instance_norm inverse isclose isfinite isinf isnan item kron layer_norm le leaky_relu
lerp lgamma linalg_inv linalg_matrix_norm linalg_norm linalg_vector_norm linear linspace log log10 log1p
log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or
logical_xor logit logspace logsumexp lstm lt mH mT masked_fill masked_scatter masked_select matmul max
max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum mean median meshgrid min minimum mish mm
mode movedim mul multinomial mv nan_to_num nanmean nansum narrow native_batch_norm native_dropout
native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero norm normal
nuclear_norm numpy_T one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle polar pow prelu
prod quantile quick_gelu rad2deg rand randn real reciprocal reflection_pad1d reflection_pad2d
reflection_pad3d relu relu6 remainder repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reshape roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention
scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign signbit silu sin
sinc sinh slice slice_scatter softmax softplus softshrink sort split split_with_sizes sqrt square squeeze
stack std std_mean stft sub sum swapaxes sym_size t take take_along_dim tan tanh tanhshrink tensor_split
threshold tile to topk trace transpose tril tril_indices triu triu_indices true_divide trunc unbind
unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d vander var var_mean vdot view view_as
view_as_complex view_as_real vstack where xlogy zeros zeros_like _softmax _log_softmax _to_copy
_native_batch_norm_legit_no_training imag hstack dstack histogram addcmul fmax fmin reshape_as type_as
new_empty_strided as_strided expand_copy
""".split()

PLAIN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "size.add": operator.add,
    "size.sub": operator.sub,
    "size.mul": operator.mul,
    "size.floordiv": operator.floordiv,
    "size.mod": operator.mod,
    "size.neg": operator.neg,
    "size.truediv": operator.truediv,
    "size.max": torch.sym_max,
    "size.min": torch.sym_min,
    "size.int": torch.sym_int,
    "size.float": torch.sym_float,
}
_NAMES = {function: name for name, function in PLAIN.items()}


@lru_cache(maxsize=1)
def allowed() -> frozenset[str]:
    """Return ``namespace.operator`` of everything a saved program may call."""
    return frozenset({f"aten.{name}" for name in _ATEN} | {f"graphopt.{name}" for name in DIALECT})


def name_of(target: Any, where: str) -> str:
    """Return the name an operator is saved under.

    Raises:
        CheckpointError: it is not on the list.
    """
    if isinstance(target, OpOverload):
        full = str(target)
        if full.rsplit(".", 1)[0] in allowed() and not target._schema.is_mutable:
            return full
    elif target in _NAMES:
        return _NAMES[target]
    raise CheckpointError(
        f"{where}: the operator {target} is not one that a saved program may hold",
        hint="replace it by operators of graphopt.ir.serialize.allowed, or report it as missing there",
    )


@lru_cache(maxsize=4096)
def operator_of(name: str) -> Any:
    """Return the operator of a saved name; nothing outside the list is ever looked up.

    Raises:
        CheckpointError: the name is not on the list.
    """
    if name in PLAIN:
        return PLAIN[name]
    parts = name.split(".")
    if len(parts) == 3 and f"{parts[0]}.{parts[1]}" in allowed():
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if packet is not None and parts[2] in packet.overloads():
            overload = getattr(packet, parts[2])
            if not overload._schema.is_mutable:
                return overload
    shown = name if len(name) <= 60 else name[:57] + "..."
    raise CheckpointError(f"{shown!r} is not an operator that a program may call")


_COUNTS = {"size.neg": 1, "size.int": 1, "size.float": 1}


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Check that a call passes what its operator takes; names of keywords become source code when it is compiled.

    Raises:
        CheckpointError: an argument is unknown, given twice or missing.
    """
    wrong = CheckpointError(f"{where}: {target} is not called as it can be")
    if not isinstance(target, OpOverload):
        count = _COUNTS.get(_NAMES[target], 2)
        if kwargs or len(args) != count or not all(isinstance(a, (fx.Node, int, float)) for a in args):
            raise wrong
        return
    schema = target._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    named = {a.name for a in schema}
    if len(args) > len(positional) or not set(kwargs) <= named - set(positional[: len(args)]):
        raise wrong
    if any(not a.has_default_value() and a.name not in kwargs for a in schema[len(args) :]):
        raise wrong
