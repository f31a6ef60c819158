"""``graphopt inspect``: blocks with evidence, cost, and what each pass could do."""

from __future__ import annotations

from collections import Counter

from ..data.reading import read_data
from ..ir.checking.report import quantity
from ..ir.cost import cost
from ..ir.errors import GraphoptError
from ..ir.facts import Capture
from ..ir.program import Program
from ..measure.context import Context
from ..passes.framework.plan import Plan
from ..passes.framework.registry import find_pass, pass_locations
from ..passes.heads.attach_early_exit import exit_quality
from .app import Inspect
from .output import note, show_json, table, text
from .progress import ShownProgress
from .sources import read_program


def inspect_checkpoint(args: Inspect) -> None:
    """Print the structure of a checkpoint."""
    program = read_program(args.checkpoint, args, at_once=True)
    note("blocks and cost ...")
    sizes = {
        n: args.batch if n.startswith("batch") else args.sequence
        for n in program.signature.sizes
        if n.startswith(("batch", "sequence"))
    }
    nearest = program.signature.nearest(sizes)
    sizes = {n: nearest[n] for n in sizes}
    estimate = cost(program, sizes, args.device)
    anatomy, inputs = program.anatomy, program.signature.inputs
    note("what each pass could do ...")
    possible = what_passes_could_do(program, ShownProgress())
    exits = _exits(program, args.data) if args.data is not None else []
    if args.as_json:
        show_json(
            {
                "inputs": {n: [str(v.dtype).removeprefix("torch."), *v.shape] for n, v in inputs.items()},
                "outputs": program.signature.output_names,
                "sizes": {n: [r.low, r.high] for n, r in program.signature.sizes.items()},
                "constraints": list(program.signature.constraints),
                "fixed_sizes": list((program.facts.get(Capture) or Capture()).fixed_sizes),
                "blocks": [
                    {"name": b.name, "kind": b.kind, "layer": b.layer, "norms": b.norms,
                     "parallel": b.parallel, "sizes": {k: str(v) for k, v in b.sizes.items()},
                     "parts": sorted(b.parts), "evidence": b.evidence}
                    for b in anatomy.blocks
                ],
                "layers": [[b.name for b in layer.blocks] for layer in anatomy.layers],
                "embedding": [n.name for n in anatomy.embedding],
                "head": [n.name for n in anatomy.head],
                "branches": [b.evidence for b in anatomy.branches],
                "operators": dict(program.operators),
                "cost": estimate.as_dict(),
                "passes": possible,
                "exits": exits,
                "unused_tensors": list(program.origin.unused),
                "facts": _unrecognised(program),
            }
        )  # fmt: skip
        return
    takes = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items())
    text(f"takes {takes}\ngives {', '.join(program.signature.output_names)}")
    limits = _limits(program)
    text(f"sizes {limits}\n" if limits else "")
    for fixed in (program.facts.get(Capture) or Capture()).fixed_sizes:
        text(fixed)
    table("Blocks", ("blocks", "norms", "evidence"), _block_rows(program))
    if anatomy.branches:
        example = anatomy.branches[0].evidence[0]
        text(f"\nbranches: {len(anatomy.branches)} sums of linear paths, e.g. {example}")
    ends = {"embedding": anatomy.embedding, "head": anatomy.head}
    others = [f"{what}: {', '.join(n.name for n in nodes)}" for what, nodes in ends.items() if nodes]
    text("\n" + "\n".join(others) + f"\nlayers: {len(anatomy.layers)}\n")
    estimated_time = ""
    if estimate.time_seconds is not None:
        estimated_time = f", {estimate.time_seconds * 1e3:.3g} ms on {args.device}, bound by {estimate.bound}"
    text(
        f"parameters {quantity(estimate.parameters)}   weights {quantity(estimate.parameter_bytes, 'B')}   at {sizes}: "
        f"{quantity(estimate.flops, 'FLOP')}, {quantity(estimate.bytes, 'B')} moved, "
        f"{quantity(estimate.peak_memory, 'B')} peak activations{estimated_time}\n"
    )
    if exits:
        shares = [(f"layer {n}", f"{share:.1%}") for n, share in enumerate(exits)]
        table("Exits", ("after", "agrees with the whole program"), shares)
    table("Passes", ("pass", "could take", "refused"), [tuple(p.values()) for p in possible])


def _exits(program: Program, data: str) -> list[float]:
    """Return for each layer but the last how often an exit after it is correct, on the first rows of the data."""
    batches, _ = read_data(program, data, sequences=8, length=256)
    return exit_quality(program, batches[0])


def _limits(program: Program) -> str:
    """Return the limits on the program's sizes as text, empty if there are none."""
    ranges = [
        f"{name} from {r.low}" + ("" if r.high is None else f" to {r.high}")
        for name, r in program.signature.sizes.items()
        if r.low > 1 or r.high is not None
    ]
    return ", ".join([*ranges, *program.signature.constraints])


def _block_rows(program: Program) -> list[tuple[str, str, str]]:
    """Return one row for each group of blocks with the same norms and evidence."""
    groups: dict[tuple[str, str], list[str]] = {}
    for block in program.anatomy.blocks:
        evidence = "; ".join(block.evidence) + (" (parallel)" if block.parallel else "")
        groups.setdefault((block.norms, evidence), []).append(block.name)
    return [
        (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})", *key)
        for key, names in groups.items()
    ]


def what_passes_could_do(program: Program, progress: ShownProgress | None = None) -> list[dict[str, str]]:
    """Return for each pass what it would do to this program with its default options."""
    progress = progress or ShownProgress()
    entries = []
    names = sorted(pass_locations())
    progress.start("passes", len(names))
    for name in names:
        try:
            could_take, refused = _plan_with_defaults(program, name)
        except GraphoptError as error:
            could_take, refused = "nothing", error.message
        entries.append({"pass": name, "could_take": could_take, "refused": refused})
        progress.step(name)
    progress.done()
    return entries


def _plan_with_defaults(program: Program, name: str) -> tuple[str, str]:
    cls = find_pass(name)
    missing = [fact.done for fact in cls.requires if fact not in program.facts]
    if missing:
        return "nothing", f"requires {', '.join(missing)}"
    plan = cls.from_options(dict(cls.trial)).plan(program, Context())
    if name == "skip-layers":
        return f"{len(program.anatomy.layers)} layers to choose from", ""
    return f"{len(plan.sites)} sites", _reasons(plan)


def _reasons(plan: Plan) -> str:
    counts = Counter(refused.reason for refused in plan.refused)
    return "; ".join(f"{count}: {reason}" for reason, count in list(counts.items())[:3])


def _unrecognised(program: Program) -> dict[str, list[str]]:
    capture = program.facts.get(Capture) or Capture()
    reasons_by_kind = {
        "unraised_attention": capture.plain_attention,
        "unraised_experts": capture.plain_experts,
    }
    return {name: list(reasons) for name, reasons in reasons_by_kind.items() if reasons}
