"""``graphopt inspect``: blocks with evidence, cost, and what each pass could do."""

from __future__ import annotations

from typing import Any

from ..data.reading import read_data
from ..ir.checking.report import quantity
from ..ir.cost import cost
from ..ir.errors import GraphoptError
from ..ir.facts import Capture
from ..ir.program import Program
from ..measure.context import Context
from ..passes.framework.registry import find_pass, pass_locations
from ..passes.heads.attach_early_exit import exit_quality
from .output import show_json, table, text
from .sources import read_program


def inspect_checkpoint(
    source: str, device: str | None, batch: int, sequence: int, data: str | None, as_json: bool, trust: bool
) -> None:
    """Print what a checkpoint is made of."""
    program = read_program(source, trust)
    sizes = {
        n: batch if n.startswith("batch") else sequence
        for n in program.signature.sizes
        if n.startswith(("batch", "sequence"))
    }
    near = program.signature.nearest(sizes)
    sizes = {n: near[n] for n in sizes}
    found = cost(program, sizes, device)
    anatomy = program.anatomy
    possible = what_passes_could_do(program)
    exits = _exits(program, data) if data is not None else []
    if as_json:
        show_json(
            {
                "inputs": {
                    n: [str(s.dtype).removeprefix("torch."), *s.shape]
                    for n, s in program.signature.inputs.items()
                },
                "outputs": program.signature.output_names,
                "sizes": {n: [r.low, r.high] for n, r in program.signature.sizes.items()},
                "constraints": list(program.signature.constraints),
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
                "cost": found.as_dict(),
                "passes": possible,
                "exits": exits,
                "unused_tensors": list(program.origin.unused),
                "facts": _unrecognised(program),
            }
        )  # fmt: skip
        return
    takes = ", ".join(f"{n} {list(s.shape)}" for n, s in program.signature.inputs.items())
    text(f"takes {takes}\ngives {', '.join(program.signature.output_names)}")
    limits = _limits(program)
    text((f"sizes {limits}\n") if limits else "")
    rows = _block_rows(program)
    table("Blocks", ("blocks", "norms", "evidence"), rows)
    if anatomy.branches:
        text(
            f"\nbranches: {len(anatomy.branches)} sums of linear paths, "
            f"e.g. {anatomy.branches[0].evidence[0]}"
        )
    others = [f"embedding: {', '.join(n.name for n in anatomy.embedding)}" if anatomy.embedding else "",
              f"head: {', '.join(n.name for n in anatomy.head)}" if anatomy.head else ""]  # fmt: skip
    text("\n" + "\n".join(o for o in others if o) + f"\nlayers: {len(anatomy.layers)}\n")
    text(
        f"parameters {quantity(found.parameters)}   weights {quantity(found.parameter_bytes, 'B')}   "
        f"at {sizes}: "
        f"{quantity(found.flops, 'FLOP')}, {quantity(found.bytes, 'B')} moved, "
        f"{quantity(found.peak_memory, 'B')} peak activations"
        + (
            f", {found.time_seconds * 1e3:.3g} ms on {device}, bound by {found.bound}"
            if found.time_seconds is not None
            else ""
        )
        + "\n"
    )
    if exits:
        shares = [(f"layer {n}", f"{share:.1%}") for n, share in enumerate(exits)]
        table("Exits", ("after", "says what the whole program says"), shares)
    table(
        "Passes",
        ("pass", "could take", "refused"),
        [(p["pass"], p["could_take"], p["refused"]) for p in possible],
    )


def _exits(program: Program, data: str) -> list[float]:
    """Return for each layer but the last how often an exit after it is right, on the first rows of the data."""
    batches, _ = read_data(program, data, sequences=8, length=256)
    return exit_quality(program, batches[0])


def _limits(program: Program) -> str:
    """Return which sizes the program takes, where it does not take all."""
    said = [
        f"{name} from {r.low}" + ("" if r.high is None else f" to {r.high}")
        for name, r in program.signature.sizes.items()
        if r.low > 1 or r.high is not None
    ]
    return ", ".join([*said, *program.signature.constraints])


def _block_rows(program: Program) -> list[tuple[str, str, str]]:
    """One row for each run of blocks that are alike."""
    groups: list[tuple[list[str], str, str]] = []
    for block in program.anatomy.blocks:
        evidence = "; ".join(block.evidence) + (" (parallel)" if block.parallel else "")
        same = next((g for g in groups if g[1:] == (block.norms, evidence)), None)
        if same:
            same[0].append(block.name)
        else:
            groups.append(([block.name], block.norms, evidence))
    rows = []
    for names, norms, evidence in groups:
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        rows.append((shown, norms, evidence))
    return rows


def what_passes_could_do(program: Program) -> list[dict[str, Any]]:
    """Return for each pass what it would take here with its defaults."""
    entries = []
    for name in sorted(pass_locations()):
        try:
            cls = find_pass(name)
            missing = [fact.done for fact in cls.requires if fact not in program.facts]
            if missing:
                entries.append(
                    {"pass": name, "could_take": "nothing", "refused": f"requires {', '.join(missing)}"}
                )
                continue
            plan = cls.from_options(dict(cls.trial)).plan(program, Context())
            taken = len(program.anatomy.layers) if name == "skip-layers" else len(plan.sites)
            unit = "layers to choose from" if name == "skip-layers" else "sites"
            reasons = "" if name == "skip-layers" else _reasons(plan)
            entries.append({"pass": name, "could_take": f"{taken} {unit}", "refused": reasons})
        except GraphoptError as error:
            entries.append({"pass": name, "could_take": "nothing", "refused": error.message})
    return entries


def _reasons(plan: Any) -> str:
    counts: dict[str, int] = {}
    for refused in plan.refused:
        counts[refused.reason] = counts.get(refused.reason, 0) + 1
    return "; ".join(f"{count}: {reason}" for reason, count in list(counts.items())[:3])


def _unrecognised(program: Program) -> dict[str, list[str]]:
    capture = program.facts.get(Capture) or Capture()
    found = {"unraised_attention": capture.plain_attention, "unraised_experts": capture.plain_experts}
    return {name: list(reasons) for name, reasons in found.items() if reasons}
