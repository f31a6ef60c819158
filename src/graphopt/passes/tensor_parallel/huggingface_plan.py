"""Tensor-parallel plans of Hugging Face configurations: patterns of module names, and how each module is sharded."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import yaml

from ...ir.anatomy import Block
from ...ir.errors import PipelineError
from ...ir.program import Program
from ...ir.schema import arguments

ROW_STYLES = ("rowwise", "rowwise_rep", "local_rowwise", "packed_rowwise", "local_packed_rowwise", "moe_tp_experts",
              "grouped_gemm", "gather")  # fmt: skip


def read_plan(path: str) -> dict[str, str]:
    """Return a plan by pattern of module names.

    Raises:
        PipelineError: the file cannot be read or is not a plan.
    """
    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PipelineError(f"cannot read the tensor-parallel plan {path}: {error}") from None
    if isinstance(plan, dict) and "base_model_tp_plan" in plan:
        plan = plan["base_model_tp_plan"]
    if not isinstance(plan, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in plan.items()
    ):
        raise PipelineError(
            f"{path} is no tensor-parallel plan",
            hint='it must map names to styles: {"layers.*.mlp.down_proj": "rowwise"}',
        )
    return dict(plan)


def chosen_by(plan: dict[str, str], program: Program, block: Block) -> str:
    """Return why the plan does not shard the last projection of a block; an empty string if it does."""
    last = block.parts.get("o") or block.parts.get("down") or block.parts.get("core")
    if last is None:
        return "it has no last projection that a plan could name"
    args = arguments(last)
    tensor = args.get("down") or args.get("weight")
    names = _names(program, tensor)
    for pattern, style in plan.items():
        for name in names:
            module = name.removesuffix(".weight")
            if any(
                fnmatch.fnmatch(module, p)
                for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
            ):
                return "" if style in ROW_STYLES else f"the plan says {style} for {name}"
    return f"the plan does not name {', '.join(sorted(names)[:1]) or 'its last projection'}"


def _names(program: Program, tensor: object) -> set[str]:
    from torch import fx

    names: set[str] = set()
    work = [tensor]
    while work:
        node = work.pop()
        if not isinstance(node, fx.Node):
            continue
        if node.name in program.weights:
            names |= set(program.weights[node.name].all_names)
        else:
            work.extend(node.all_input_nodes)
    return names
