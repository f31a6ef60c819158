"""The aten operators that a saved program may call, listed individually.

Every operator here computes a value from its arguments and does nothing else. Allowing a whole namespace would be
unsafe: ``aten`` has operators that write and read files, share memory, or read memory at unchecked offsets.
Core operators are those that torch tags as such; a test compares them with this list.
"""

from __future__ import annotations

REFUSED = {
    "resize_": "it writes to its operand",
    "empty_strided": "it returns uninitialised memory with explicit strides",
    "sym_is_contiguous": "memory layout is not part of a program",
    "sym_storage_offset": "memory layout is not part of a program",
    "sym_stride": "memory layout is not part of a program",
    "as_strided_scatter": "it writes by an address in memory",
    "ctc_loss": "labels and lengths are not fully checked against each other before memory is read",
    "segment_reduce": "lengths may be left unchecked before memory is read",
    "lu_solve": "pivots reach LAPACK unchecked",
    "linalg_lu_solve": "pivots reach LAPACK unchecked",
    "linalg_ldl_solve": "pivots reach LAPACK unchecked",
}
"""Operators that captured programs may contain and saved programs may not, with reasons."""

_CORE = """
abs acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d add
addmm alias amax amin any arange argmax argmin as_strided asin asinh atan atan2 atanh avg_pool1d avg_pool2d
avg_pool2d_backward avg_pool3d bitwise_and bitwise_not bitwise_or bitwise_xor bmm cat _cdist_forward ceil clamp
clone col2im constant_pad_nd convolution convolution_backward copy cos cosh cumsum diagonal div elu embedding
_embedding_bag embedding_dense_backward empty eq erf exp expand expm1 _fft_c2r _fft_r2c fill flip floor fmod
full full_like gather ge gelu grid_sampler_2d gt hardtanh index index_put index_select isinf isnan le leaky_relu
_local_scalar_dense log log10 log1p log2 _log_softmax logical_and logical_not logical_or logical_xor lt
masked_scatter max max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices maximum mean
min minimum mm mul _native_batch_norm_legit _native_batch_norm_legit_no_training native_dropout
native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward ne neg nonzero
_pdist_forward permute pow prod rand randn randperm reciprocal reflection_pad1d reflection_pad2d
reflection_pad3d relu remainder repeat replication_pad2d replication_pad3d round rsqrt scalar_tensor scatter
scatter_add scatter_reduce select select_scatter sigmoid sign sin sinh slice slice_scatter _softmax sort
split_with_sizes sqrt squeeze sub sum sym_numel sym_size tan tanh _to_copy topk trunc unsqueeze
upsample_bilinear2d upsample_nearest2d var view where
""".split()

_OTHERS = """
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm
addcdiv addcmul addmv addr adjoint affine_grid_generator alias_copy all alpha_dropout aminmax angle argsort
argwhere atleast_1d atleast_2d atleast_3d baddbmm bartlett_window batch_norm bernoulli bilinear
binary_cross_entropy binary_cross_entropy_with_logits bincount bitwise_left_shift bitwise_right_shift
blackman_window block_diag broadcast_tensors broadcast_to bucketize cartesian_prod cdist celu chain_matmul
channel_shuffle cholesky cholesky_inverse cholesky_solve chunk clamp_max clamp_min column_stack combinations
complex concat conj conj_physical contiguous conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
conv_transpose3d _convolution copysign corrcoef cosine_embedding_loss cosine_similarity count_nonzero cov cross
cross_entropy_loss cummax cummin cumprod cumulative_trapezoid deg2rad det detach_copy diag diag_embed diagflat
diagonal_copy diagonal_scatter diff digamma dist dot dropout dsplit dstack einsum embedding_bag empty_like erfc
erfinv _euclidean_dist exp2 expand_as expand_copy eye fake_quantize_per_channel_affine
fake_quantize_per_tensor_affine feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn
fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2
fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn flatten fliplr flipud
float_power floor_divide fmax fmin frac frexp frobenius_norm _fused_rms_norm gcd ger glu gradient grid_sampler
grid_sampler_3d group_norm gru gru_cell hamming_window hann_window hardshrink hardsigmoid hardswish heaviside
hinge_embedding_loss histc histogram hsplit hstack huber_loss hypot i0 igamma igammac im2col imag index_add
index_copy index_fill index_reduce inner instance_norm inverse isclose isfinite isin isneginf isposinf isreal
istft item kaiser_window kl_div kron kthvalue l1_loss layer_norm lcm ldexp lerp lgamma linalg_cholesky
linalg_cond linalg_cross _linalg_det linalg_det linalg_diagonal linalg_eig _linalg_eigh linalg_eigh
linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_lu
linalg_lu_factor linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_matrix_rank
linalg_multi_dot linalg_norm linalg_pinv linalg_qr _linalg_slogdet linalg_slogdet linalg_solve _linalg_solve_ex
linalg_solve_ex linalg_solve_triangular _linalg_svd linalg_svd linalg_svdvals linalg_tensorinv
linalg_tensorsolve linalg_vander linalg_vecdot linalg_vector_norm linear linspace log_sigmoid
log_sigmoid_forward log_softmax logaddexp logaddexp2 logcumsumexp logdet logit logspace logsumexp lstm lstm_cell
margin_ranking_loss masked_fill masked_select matmul matrix_exp matrix_H matrix_power max_pool1d
max_pool1d_with_indices max_pool2d max_pool3d max_unpool2d max_unpool3d median meshgrid mH mish mode movedim
mse_loss msort mT multinomial mv mvlgamma nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy
native_batch_norm native_channel_shuffle new_empty new_empty_strided new_full new_ones new_zeros nextafter
nll_loss nll_loss2d nll_loss_nd nonzero_static norm normal nuclear_norm numpy_T one_hot ones ones_like orgqr
ormqr outer pad pad_sequence pairwise_distance pdist permute_copy pinverse pixel_shuffle pixel_unshuffle
poisson_nll_loss polar polygamma prelu _prelu_kernel put quantile rad2deg rand_like randint randint_like
randn_like range ravel real relu6 renorm repeat_interleave replication_pad1d reshape reshape_as resolve_conj
resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 rrelu rsub
scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu
searchsorted select_copy selu sgn signbit silu sinc slice_copy slogdet smooth_l1_loss soft_margin_loss softmax
softplus softshrink special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtr
special_ndtri special_xlog1py special_zeta split split_copy split_with_sizes_copy square squeeze_copy stack std
std_mean stft swapaxes swapdims t t_copy take take_along_dim tensor_split tensordot threshold tile to trace
transpose transpose_copy trapezoid triangular_solve tril tril_indices triplet_margin_loss triu triu_indices
true_divide type_as unbind unbind_copy unflatten unfold unfold_copy unique_consecutive unique_dim unsafe_chunk
_unsafe_index unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze_copy upsample_bicubic2d
_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d upsample_nearest3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d vander
var_mean vdot view_as view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit
vstack _weight_norm xlogy zeros zeros_like
""".split()

ATEN = frozenset((*_CORE, *_OTHERS))
"""Names without their namespace; allowed are all overloads that do not write to an operand."""
