"""Passes by name: built-in ones, and those that installed packages offer by entry point."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from ...ir.errors import PipelineError

if TYPE_CHECKING:
    from .base import Pass

ENTRY_POINT_GROUP = "graphopt.passes"

BUILT_IN: dict[str, str] = {
    "fuse-projections": "graphopt.passes.projections.fuse_projections:FuseProjections",
    "split-projections": "graphopt.passes.projections.split_projections:SplitProjections",
    "fold-norms": "graphopt.passes.projections.fold_norms:FoldNorms",
    "fuse-branches": "graphopt.passes.convolutions.fuse_branches:FuseBranches",
    "expand-branches": "graphopt.passes.convolutions.expand_branches:ExpandBranches",
    "stream-convolutions": "graphopt.passes.convolutions.stream_convolutions:StreamConvolutions",
    "window-attention": "graphopt.passes.attention.window_attention:WindowAttention",
    "fit-target": "graphopt.passes.quantization.fit_target:FitTarget",
    "quantize": "graphopt.passes.quantization.quantize:Quantize",
    "quantize-weights": "graphopt.passes.quantization.quantize_weights:QuantizeWeights",
    "dequantize-weights": "graphopt.passes.quantization.dequantize_weights:DequantizeWeights",
    "insert-cache": "graphopt.passes.caching.insert_cache:InsertCache",
    "share-caches": "graphopt.passes.caching.share_caches:ShareCaches",
    "quantize-cache": "graphopt.passes.caching.quantize_cache:QuantizeCache",
    "attach-multi-token-heads": "graphopt.passes.heads.attach_multi_token_heads:AttachMultiTokenHeads",
    "attach-draft": "graphopt.passes.heads.attach_draft:AttachDraft",
    "attach-mask-tokens": "graphopt.passes.heads.attach_mask_tokens:AttachMaskTokens",
    "attach-early-exit": "graphopt.passes.heads.attach_early_exit:AttachEarlyExit",
    "trim-vocabulary": "graphopt.passes.heads.trim_vocabulary:TrimVocabulary",
    "take-top-k": "graphopt.passes.heads.take_top_k:TakeTopK",
    "fuse-kernels": "graphopt.passes.kernels.fuse_kernels:FuseKernels",
    "skip-layers": "graphopt.passes.depth.skip_layers:SkipLayers",
    "dial-top-k": "graphopt.passes.experts.dial_top_k:DialTopK",
    "prune-experts": "graphopt.passes.experts.prune_experts:PruneExperts",
    "sort-ffn": "graphopt.passes.width.sort_ffn:SortFfn",
    "prune-ffn": "graphopt.passes.width.prune_ffn:PruneFfn",
    "split-ffn": "graphopt.passes.width.split_ffn:SplitFfn",
    "extract-width": "graphopt.passes.width.extract_width:ExtractWidth",
    "freeze-dial": "graphopt.passes.settings.freeze_dial:FreezeDial",
    "shard-tensor-parallel": "graphopt.passes.tensor_parallel.shard_tensor_parallel:ShardTensorParallel",
    "group-heads": "graphopt.passes.tensor_parallel.group_heads:GroupHeads",
    "drop-sync-points": "graphopt.passes.tensor_parallel.drop_sync_points:DropSyncPoints",
    "quantize-communication": "graphopt.passes.tensor_parallel.quantize_communication:QuantizeCommunication",
}

FORMER_NAMES = {"insert-kv-cache": "insert-cache"}
"""Names under which passes are found as well: pipelines and plan files of before go on working."""


def pass_locations() -> dict[str, str]:
    """Return the location of each pass, ``module:class`` by name, without importing any.

    Raises:
        PipelineError: two packages offer a pass of the same name.
    """
    locations = dict(BUILT_IN)
    for point in _offered(_installed()):
        if point.name in locations and locations[point.name] != point.value:
            raise PipelineError(
                f"the pass {point.name!r} is offered twice: by {locations[point.name]} and {point.value}",
                hint="uninstall one of the packages",
            )
        locations[point.name] = point.value
    return locations


@functools.lru_cache(maxsize=1)
def _offered(installed: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Return what packages offer; all of their metadata is read for it, and every pass that is looked up asks."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _installed() -> tuple[tuple[str, int], ...]:
    """Return what is not the same after a package was installed."""
    return tuple((place, os.stat(place).st_mtime_ns) for place in sys.path if os.path.exists(place))


def find_pass(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises:
        PipelineError: there is none of that name, or it cannot be imported.
    """
    from .base import Pass

    locations = pass_locations()
    name = FORMER_NAMES.get(name, name)
    if name not in locations:
        near = difflib.get_close_matches(name, locations, n=1)
        raise PipelineError(
            f"there is no pass {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"passes are {', '.join(sorted(locations))}",
        )
    module, _, attribute = locations[name].partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PipelineError(f"the pass {name!r} at {locations[name]} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PipelineError(f"{locations[name]} is not a pass")
    if cls.name != name:
        raise PipelineError(f"{locations[name]} is registered as {name!r} and calls itself {cls.name!r}")
    return cls
