"""Passes: changes to a program, each with options, a plan, a contract and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir.option import option
from .framework.base import Pass
from .framework.contracts import (
    AddsOutputs,
    Approximate,
    Contract,
    Exact,
    ExactAt,
    ExactInChunks,
    NewFunction,
)
from .framework.pipeline import format_pipeline, parse_pipeline
from .framework.plan import Plan, Refused, Site
from .framework.registry import BUILT_IN, find_pass, pass_locations

if TYPE_CHECKING:
    from ..measure.context import Context
    from .convolutions.expand_branches import ExpandBranches
    from .convolutions.fuse_branches import FuseBranches
    from .convolutions.stream_convolutions import StreamConvolutions
    from .depth.skip_layers import SkipLayers
    from .projections.fold_norms import FoldNorms
    from .projections.fuse_projections import FuseProjections
    from .projections.split_projections import SplitProjections

__all__ = [
    "AddsOutputs",
    "Approximate",
    "Context",
    "Contract",
    "Exact",
    "ExactAt",
    "ExactInChunks",
    "ExpandBranches",
    "FoldNorms",
    "FuseBranches",
    "FuseProjections",
    "NewFunction",
    "Pass",
    "Plan",
    "Refused",
    "Site",
    "SkipLayers",
    "SplitProjections",
    "StreamConvolutions",
    "find_pass",
    "format_pipeline",
    "option",
    "parse_pipeline",
    "pass_locations",
]


def __getattr__(name: str) -> Any:
    if name == "Context":
        from ..measure.context import Context

        return Context
    for location in BUILT_IN.values():
        module, _, attribute = location.partition(":")
        if attribute == name:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
