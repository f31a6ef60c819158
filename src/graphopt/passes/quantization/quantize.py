"""Quantisation of every value that a device computes, and of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.errors import LoweringError, PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import Canonical, Legal, Quantized, QuantizedCache
from ...ir.option import option
from ...ir.program import Program
from ...ir.quantised.stored import is_quantised
from ...ir.schema import arguments, is_operator
from ...measure.metrics import METRICS
from ...targets import Target, find_target
from ...targets.partition import host_nodes
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.kept_tensors import keep, kept
from ..framework.plan import Plan, Refused, Site
from .masks import mask_sites
from .precision import bearing
from .ranges import Ranges, observe, scale_of
from .rounding import Moments, fitted, matrix_scales, nearest
from .values import (
    constant_value,
    features_of,
    matrices_of,
    moved,
    silent_inputs,
    tables_of,
    values_of,
    whole_matrices,
)

if TYPE_CHECKING:
    from ...measure.context import Context

composites = torch.ops.graphopt
STORED = {8: ("uint8", 255), 16: ("uint16", 65535)}
WHOLE = {8: ("int8", 127), 4: ("int4", 7)}


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store activations as integers of 8 or 16 bits and weights in 8 or 4, calibrated on data and judged on other data.

    Each activation has one scale and zero point, from its smallest and largest value in calibration; values that are
    only moved keep those of their source. Matrices have a symmetric scale for each output channel, or for each block
    of its inputs; four-bit integers are fitted to the matrix's inputs (GPTQ, arXiv 2210.17323). With ``mixed``, the
    matrices that lose most at four bits, as measured, keep eight. Embedding tables, norm weights and other constants
    are stored like activations. In PyTorch the program computes the dequantised values; lowering writes
    QuantizeLinear and DequantizeLinear, and nothing else.
    """

    name = "quantize"
    contract = Approximate()
    requires = (Canonical, Legal)
    provides = (Quantized,)
    excludes = (Quantized, QuantizedCache)
    metric_calibrates = True
    paper = "rounding: arXiv 2210.17323"

    weights: int = option(8, help="bits of a matrix's weight", choices=(8, 4))
    activations: int = option(16, help="bits of an activation", choices=(8, 16))
    block: int = option(0, help="inputs of a matrix that share a scale; 0: all of a row", low=0)
    rounding: str = option(
        "auto",
        help="how weights are rounded; auto: fitted for 4 bits",
        choices=("auto", "nearest", "fitted"),
    )
    mixed: bool = option(
        False, help="keep the matrices that lose most at 4 bits at 8, until the loss is within the budget"
    )
    target: str | None = option(
        None, help="a device: what it does not support in so few bits is stored in more"
    )
    budget: float | None = option(None, help="largest relative loss", low=0)
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require a known target, and for mixed precision four bits and a budget."""
        if self.target is not None:
            try:
                find_target(self.target)
            except LoweringError as error:
                raise PipelineError(f"{self.name}: {error.message}", hint=error.hint) from None
        if self.mixed and (self.weights != 4 or self.budget is None):
            raise PipelineError(
                f"{self.name}: mixed=true chooses between 4 and 8 bits by a budget",
                hint="quantize{weights=4 mixed=true budget=0.01}",
            )

    @property
    def _fits(self) -> bool:
        return self.rounding == "fitted" or (self.rounding == "auto" and self.weights == 4)

    def plan(self, program: Program, context: Context) -> Plan:
        """Observe ranges on calibration data, and choose a scale for each value and bits and integers for each matrix."""
        plan = Plan()
        why = "its matrices are selected per token, which cannot be quantised"
        plan.refused = [
            Refused(n.name, why, program.source_line(n))
            for n in program.nodes if is_operator(n, "graphopt.routed_ffn", "graphopt.nested_ffn")
        ]  # fmt: skip
        plan.refused += [
            Refused(n.name, "it is stored in few bits already; dequantize-weights makes it plain", "")
            for n in program.weight_nodes if is_quantised(program.weights[n.name].source)
        ]  # fmt: skip
        if plan.refused:
            return plan
        original = program
        plan.sites, plan.notes = mask_sites(program, context)
        if plan.sites:
            program = self.copied(program)
            self._set_masks(program, plan)
        values, matrices = values_of(program), matrices_of(program)
        features = {node: dim for users in matrices.values() for node, dim in (features_of(u) for u in users)}
        ranges = observe(program, context, values, features)
        self._plan_values(program, plan, values, ranges)
        tables = tables_of(program, matrices)
        plan.sites += self._constants(program, tables)
        plan.notes += whole_matrices(tables, self.activations)
        plan.notes += silent_inputs(matrices, ranges)
        sites = self._plan_matrices(plan, matrices)
        scales = {site.block: _scales_of(original, site) for site in sites}
        if self._fits:
            where = self._fit(program, context, sites, matrices, scales)
            for site in sites:
                site.choices["integers"] = where
        if self.mixed:
            self._mix(original, program, context, plan, sites)
        plan.sites += sites
        return plan

    def _plan_values(self, program: Program, plan: Plan, values: list[fx.Node], ranges: Ranges) -> None:
        dtype, steps = STORED[self.activations]
        scales: dict[fx.Node, tuple[float, int]] = {}
        for node in values:
            source = moved(node)
            if source is not None and source in scales:
                scales[node] = scales[source]
            elif node not in ranges.of:
                plan.refused.append(
                    Refused(node.name, "calibration never computed it", program.source_line(node))
                )
                continue
            else:
                low, high = ranges.of[node]
                if low == high == 0.0:
                    plan.notes.append(
                        f"{node.name} is zero on all calibration data, and will be zero on all other"
                        f" [{program.source_line(node)}]"
                    )
                scales[node] = scale_of(low, high, steps)
                usual = ranges.usual[node]
                if scales[node][0] > usual > 0:
                    plan.notes.append(
                        f"{node.name} reaches from {low:.4g} to {high:.4g}, and half of its values are below {usual:.4g}, "
                        f"less than a step: they are lost; a smaller mask value would help [{program.source_line(node)}]"
                    )
            plan.sites.append(
                Site(node.name, what="value", dtype=dtype, scale=scales[node][0], zero_point=scales[node][1])
            )
        if plan.refused:
            raise PassRefusedError(
                f"{self.name}: calibration never computed {plan.refused[0].block}",
                hint="use data that covers every branch of the model",
            )

    def _constants(self, program: Program, tables: list[fx.Node]) -> list[Site]:
        dtype, steps = STORED[self.activations]
        sites = []
        for value in tables:
            tensor = constant_value(program, value)
            scale, zero = scale_of(float(tensor.min()), float(tensor.max()), steps)
            sites.append(Site(value.name, what="constant", dtype=dtype, scale=scale, zero_point=zero))
        return sites

    def _plan_matrices(self, plan: Plan, matrices: dict[fx.Node, list[fx.Node]]) -> list[Site]:
        """Return a site for each matrix with the requested bits and blocks, as far as the target supports them."""
        target = find_target(self.target) if self.target is not None else None
        sites = []
        for node, users in matrices.items():
            bits, block = self.weights, self.block
            linear = all(is_operator(u, "aten.linear") for u in users)
            inputs = int(node.meta["val"].shape[1])
            if block and (not linear or inputs % block):
                why = "no matrix of linear operators" if not linear else f"of {inputs} inputs"
                plan.notes.append(
                    f"{node.name} is {why}, and has a scale for each channel, not for {block} inputs"
                )
                block = 0
            if target is not None:
                bits, block, notes = _supported_precision(target, users, bits, self.activations, block)
                plan.notes += [f"{node.name}: {s}" for s in notes]
            sites.append(Site(node.name, what="matrix", dtype=WHOLE[bits][0], block_size=block))
        return sites

    def _fit(
        self,
        program: Program,
        context: Context,
        sites: list[Site],
        matrices: dict[fx.Node, list[fx.Node]],
        scales: dict[str, torch.Tensor],
    ) -> str:
        """Fit integers to calibration data and return where they are stored.

        Of a matrix whose nearest integers fit best, only the scales are stored.
        """
        by_name = {n.name: n for n in matrices}
        rounded: dict[str, torch.Tensor] = {}
        by_block = {s.block: s for s in sites}
        for node, moments in Moments(program, context).each(by_name[s.block] for s in sites):
            site = by_block[node.name]
            weight, high, scale = constant_value(program, node), _largest(site), scales[node.name]
            rows = weight.flatten(1).chunk(moments.shape[0]), scale.chunk(moments.shape[0])
            rounded_parts = [fitted(w, s, m, high) for w, s, m in zip(*rows, moments, strict=True)]
            integers = torch.cat(rounded_parts).reshape(weight.shape)
            if not torch.equal(integers.flatten(1), nearest(weight, scale, high)):
                rounded[node.name] = integers
            rounded[f"{node.name}.steps"] = scale
        return keep(rounded, context.work_dir, "integers")

    def _mix(
        self, original: Program, program: Program, context: Context, plan: Plan, sites: list[Site]
    ) -> None:
        """Keep the matrices that lose most at four bits at eight.

        Args:
            original: whose weights have scales.
            program: it with other masks.
        """
        by_name = {s.block: s for s in sites if s["dtype"] == "int4"}
        eight = {
            n: Site(n, what="matrix", dtype="int8", block_size=s["block_size"]) for n, s in by_name.items()
        }

        scales = {(s.block, s["dtype"]): _scales_of(original, s) for s in [*sites, *eight.values()]}

        def few(edited: Program, name: str) -> None:
            node = next(n for n in edited.graph.nodes if n.name == name)
            _round_matrix(edited, node, by_name[name], scales[name, "int4"])

        def all_of(names: Sequence[str]) -> Program:
            copy = self.copied(program)
            mixed = [s if s.block not in eight or s.block in names else eight[s.block] for s in sites]
            chosen = {s.block: scales[s.block, s["dtype"]] for s in mixed}
            self._carry_out(copy, Plan(sites=[*plan.sites, *mixed]), chosen)
            return copy

        sizes = {n.name: n.meta["val"].numel() for n in program.graph.nodes if n.name in by_name}
        assert self.budget is not None
        four_bit, alone, loss = bearing(
            program, context, list(by_name), sizes, few, all_of, self.budget, self.metric, str(self)
        )
        for site in sites:
            if site.block in eight and site.block not in four_bit:
                site.choices = dict(eight[site.block].choices)
        plan.scores = {name: alone[name] for name in by_name}
        plan.notes.append(
            f"{len(four_bit)} of {len(by_name)} matrices are stored in 4 bits, {sum(sizes[n] for n in four_bit)} of "
            f"{sum(sizes.values())} numbers; loss on calibration data {loss:.3g}, budget {self.budget:g}"
        )

    @staticmethod
    def _set_masks(program: Program, plan: Plan) -> None:
        nodes = {n.name: n for n in program.graph.nodes}
        for site in plan.sites:
            if site["what"] == "mask":
                program.edit.change(nodes[site.block], hidden=float(site["hidden"]))

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Insert rounding after each value and weight, and set masks to values within the ranges."""
        if plan.sites:
            scales = {s.block: _scales_of(program, s) for s in plan.sites if s["what"] == "matrix"}
            self._carry_out(program, plan, scales)

    def _carry_out(self, program: Program, plan: Plan, scales: dict[str, torch.Tensor]) -> None:
        edit, host = program.edit, host_nodes(program)
        self._set_masks(program, plan)
        nodes = {n.name: n for n in program.graph.nodes}
        for site in plan.sites:
            node = nodes[site.block]
            if site["what"] == "mask":
                continue
            if site["what"] == "matrix":
                replacement = _round_matrix(program, node, site, scales[site.block])
            else:
                with edit.after(node):
                    replacement = edit.call(
                        composites.fake_quantize.default, node, float(site["scale"]), int(site["zero_point"]),
                        dtype=site["dtype"],
                    )  # fmt: skip
                edit.replace(node, replacement, record=False)
            for user in [u for u in replacement.users if u in host]:
                # the host reads the value without rounding
                user.replace_input_with(replacement, node)
        counts = {w: sum(s["what"] == w for s in plan.sites) for w in ("value", "matrix", "constant")}
        few = sum(s["what"] == "matrix" and s["dtype"] == "int4" for s in plan.sites)
        weights = "4" if few == counts["matrix"] else "8" if not few else "4or8"
        kind = f"w{weights}a{self.activations}"
        program.facts.add(Quantized(self.weights, self.activations, kind, **counts, four_bits=few))
        block_export(program, "a folder has no place for ranges of activations; lower it, or save it")


def _largest(site: Site) -> int:
    """Return the largest integer of a matrix."""
    return dict(WHOLE.values())[site["dtype"]]


def _scales_of(program: Program, site: Site) -> torch.Tensor:
    """Return the scales of a matrix of a program before it is rewritten, measured once for it and its copies."""
    high, block = _largest(site), int(site.choices.get("block_size", 0))

    def measure() -> torch.Tensor:
        nodes = {n.name: n for n in program.graph.nodes}
        return matrix_scales(constant_value(program, nodes[site.block]), high, block)

    scales: torch.Tensor = program.derived(
        ("scales of a matrix", site.block, high, block), measure, portable=True
    )
    return scales


def _round_matrix(program: Program, node: fx.Node, site: Site, scales: torch.Tensor) -> fx.Node:
    """Insert rounding after a matrix, to the nearest integers or to the stored ones."""
    edit = program.edit
    stored = program.weights.get(node.name)
    name = stored.name if stored is not None else node.name
    scale = edit.add_weight(f"{name}_quantize_scale", scales, kind="buffer")
    integers = None
    where = site.choices.get("integers")
    fitted_before = kept(str(where)) if where else {}
    if not torch.equal(fitted_before.get(f"{node.name}.steps", scales), scales):
        raise PipelineError(
            f"the integers of {node.name} were fitted to other steps than {site['dtype']} has in the plan",
            hint="plan again with the bits and blocks that you want, or remove integers from the site",
        )
    if node.name in fitted_before:
        integers = edit.add_weight(f"{name}_quantize_integers", fitted_before[node.name], kind="buffer")
    # next to the first reader: at the top of the graph, all matrices would be in memory twice
    readers = set(node.users)
    first = next(n for n in program.graph.nodes if n in readers) if readers else node.next
    with edit.before(first):
        replacement = edit.call(
            composites.fake_quantize_channels.default, node, scale, integers, axis=0, dtype=site["dtype"]
        )
    edit.replace(node, replacement, record=False)
    return replacement


def _supported_precision(
    target: Target, users: list[fx.Node], bits: int, activations: int, block: int
) -> tuple[int, int, list[str]]:
    """Return the bits and block size that a target supports for a matrix, and notes on what it does not support."""
    notes: list[str] = []
    kinds = {_onnx_operator(u): u.meta["val"].dim() for u in users}

    def refused(bits: int) -> str:
        whys = (target.refuses(name, dims, f"w{bits}a{activations}") for name, dims in kinds.items())
        return next((why for why in whys if why), "")

    why = refused(bits)
    if bits == 4 and why:
        notes.append(f"8 bits, since {why}")
        bits = 8
    elif why:
        notes.append(f"lowering will refuse it: {why}")
    kind = f"w{bits}a{activations}"
    if block and not all(target.takes_blocks(name, kind) for name in kinds):
        notes.append(
            f"a scale for each channel, since {target.name} supports no blocks of inputs for it in {kind}"
        )
        block = 0
    return bits, block, notes


def _onnx_operator(node: fx.Node) -> str:
    if not is_operator(node, "aten.linear"):
        return "Conv"
    args = arguments(node)
    return "Gemm" if args["bias"] is not None and node.meta["val"].dim() == 2 else "MatMul"
