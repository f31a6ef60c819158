"""Every pass has a test that draws models or options and holds what the pass makes to what it promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from graphopt.passes.framework.registry import BUILT_IN

PASSES = Path(__file__).parent.parent

PROPERTIES: dict[str, str] = {
    "fuse-projections": "framework/test_pass_properties.py::test_exact_passes_keep_the_function_in_any_order",
    "split-projections": "framework/test_pass_properties.py::test_splitting_undoes_fusing",
    "fold-norms": "projections/test_passes.py::test_random_pipelines_on_random_transformers",
    "fuse-branches": "convolutions/test_fuse_branches.py::test_random_branches_fuse_exactly",
    "expand-branches": "convolutions/test_expand_branches.py::test_expanded_trained_fused",
    "stream-convolutions": "convolutions/test_stream_convolutions.py::test_pieces_of_any_size_give_what_the_whole_gives",
    "window-attention": "attention/test_window_attention.py::test_it_is_the_module_with_that_band",
    "fit-target": "quantization/test_quantization_properties.py::test_fitted_forms_are_the_function",
    "quantize": "quantization/test_quantization_properties.py::test_what_few_bits_lose",
    "quantize-weights": "quantization/test_quantization_properties.py::test_weights_alone_in_few_bits",
    "dequantize-weights": "quantization/test_quantization_properties.py::test_weights_alone_in_few_bits",
    "insert-cache": "caching/test_kv_cache.py::test_any_decoder_in_any_pieces",
    "share-caches": "caching/test_share_caches.py::test_any_decoder_is_the_one_built_so",
    "quantize-cache": "caching/test_quantize_cache.py::test_any_pieces_give_the_whole",
    "attach-multi-token-heads": "heads/test_head_properties.py::test_multi_token_heads",
    "attach-draft": "heads/test_head_properties.py::test_an_attached_draft",
    "attach-mask-tokens": "heads/test_head_properties.py::test_mask_tokens",
    "attach-early-exit": "heads/test_head_properties.py::test_early_exits",
    "trim-vocabulary": "heads/test_head_properties.py::test_a_trimmed_vocabulary",
    "take-top-k": "heads/test_head_properties.py::test_the_largest_entries",
    "fuse-kernels": "kernels/test_fuse_kernels.py::test_joining_keeps_the_function",
    "skip-layers": "depth/test_skip_layers.py::test_any_decoder_is_the_one_built_without",
    "dial-top-k": "experts/test_expert_properties.py::test_fewer_that_take_part",
    "prune-experts": "experts/test_expert_properties.py::test_experts_that_go_are_never_chosen",
    "sort-ffn": "width/test_width.py::test_sorting_changes_nothing_but_the_order",
    "prune-ffn": "width/test_width.py::test_pruning_is_zeroing",
    "split-ffn": "width/test_split_ffn.py::test_whole_is_exact_and_each_width_is_its_extract",
    "extract-width": "width/test_split_ffn.py::test_whole_is_exact_and_each_width_is_its_extract",
    "freeze-dial": "settings/test_freeze_dial.py::test_frozen_is_held",
    "shard-tensor-parallel": "tensor_parallel/test_tensor_parallel.py::test_ranks_together_compute_what_the_model_does",
    "group-heads": "tensor_parallel/test_rank_properties.py::test_heads_in_another_order",
    "drop-sync-points": "tensor_parallel/test_sync_points.py::test_error_is_what_the_feed_forwards_of_the_ranks_miss",
    "quantize-communication": "tensor_parallel/test_rank_properties.py::test_sums_in_few_bits",
}
"""The test of each pass, by its file below tests/passes."""


def test_every_pass_has_one() -> None:
    assert sorted(PROPERTIES) == sorted(BUILT_IN), "a pass without a property, or a property without a pass"


@pytest.mark.parametrize("name", PROPERTIES)
def test_it_draws_what_it_tests(name: str) -> None:
    """Wrong if the test were renamed, drew nothing, or its file never ran the pass."""
    file, _, wanted = PROPERTIES[name].partition("::")
    text = (PASSES / file).read_text()
    found = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == wanted]
    assert found, f"there is no {PROPERTIES[name]}"
    decorators = [ast.unparse(d) for d in found[0].decorator_list]
    assert any(d.startswith("given(") for d in decorators), f"{wanted} draws nothing"
    attribute = BUILT_IN[name].partition(":")[2]
    assert name in text or attribute in text, f"{file} never runs {name}"
