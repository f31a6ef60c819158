"""Quantised communication: ranks send about four bits per value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.cost.collectives import find_link
from ...ir.errors import PassRefusedError, PipelineError, UsageError
from ...ir.facts import QuantizedCommunication, TensorParallel
from ...ir.groups import TENSOR_PARALLEL
from ...ir.operators.quantized import payload_bytes
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...ir.ranks.placement import placements
from ...ir.ranks.rank_programs import ranks_of
from ...ir.schema import arguments, is_operator
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.kept_tensors import keep, kept
from ..framework.plan import Plan, Refused, Site
from .calibration import FLOOR, calibrate

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class QuantizeCommunication(Pass):
    """Send the terms of all-reduces as small integers, and the features of largest range in bfloat16.

    After arXiv 2411.07942: ranges are moving averages of each feature's extremes over calibration sequences, by rank;
    the features whose ranges, summed over ranks, are largest are sent in bfloat16, the others as symmetric integers
    with a static scale by rank and feature. Only values are sent: with one outlier in 64 features and 4 bits, 4.1875
    bits per value. With ``group``, a float16 scale for each group of features is computed at run time and sent too,
    as in other engines, and no data is needed.

    ``gather`` sends everything to every rank in one step; from 8 ranks on it moves more bytes than a bfloat16 ring.
    ``two-step`` sums a share of the features on each rank and sends the sums, quantised again. Sums are in float32 in
    the order of ranks, so that ranks agree bit for bit. Ranges are valid for the program that they were measured on:
    drop sync points first.
    """

    name = "quantize-communication"
    contract = Approximate("perplexity")
    requires = (TensorParallel,)
    excludes = (QuantizedCommunication,)
    trial = {"group": 32, "outliers": "none"}  # noqa: RUF012
    provides = (QuantizedCommunication,)
    paper = "arXiv 2411.07942"

    bits: int = option(4, help="of the integers", source="paper", low=2, high=8)
    outliers: str = option(
        "calibrated",
        help="which features are sent in bfloat16",
        source="paper",
        choices=("calibrated", "random", "none"),
    )
    share: float = option(
        1 / 64,
        help="share of features that are outliers",
        source="paper",
        low=0,
        high=1,
        needs={"outliers": ("calibrated", "random")},
    )
    group: int = option(0, help="features that share a scale computed at run time; 0: static scales", low=0)
    algorithm: str = option(
        "auto", help="how sums are computed; auto: by message size", choices=("auto", "gather", "two-step")
    )
    link: str = option(
        "nvlink",
        help="the link whose latency and bandwidth decide the algorithm",
        needs={"algorithm": "auto"},
    )
    rate: float = option(
        0.01,
        help="weight of a new sequence in the moving averages",
        source="paper",
        low=0,
        high=1,
        needs=[{"group": 0}, {"outliers": "calibrated"}],
    )
    budget: float | None = option(None, help="largest relative loss", low=0)
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require a known link."""
        try:
            find_link(self.link)
        except UsageError as error:
            raise PipelineError(f"{self.name}: {error.message}", hint=error.hint) from None

    @property
    def _needs_ranges(self) -> bool:
        return not self.group or self.outliers == "calibrated"

    def plan(self, program: Program, context: Context) -> Plan:
        """Measure ranges on calibration data, if they are needed."""
        plan = Plan()
        sums: list[fx.Node] = []
        for node in program.graph.nodes:
            if not is_operator(node, "graphopt.all_reduce"):
                continue
            if is_operator(node.args[0], "graphopt.local_embedding"):
                reason = "each token's row is on one rank, and its sum with zeros is exact"
                plan.refused.append(Refused(node.name, reason, program.source_line(node)))
            else:
                sums.append(node)
        if not sums:
            return plan
        where = ""
        if self._needs_ranges:
            if not context.data:
                raise PassRefusedError(
                    f"{self.name}: static scales need data to measure ranges on",
                    hint="give data, or use scales computed at run time: group=128 outliers=none",
                )
            ranges = calibrate(program, context, sums, self.rate)
            where = keep(ranges, context.work_dir, "ranges")
        link = find_link(self.link)
        total_bits = []
        for node in sums:
            features = int(node.meta["val"].shape[-1])
            outliers = 0 if self.outliers == "none" else int(features * self.share)
            bits = 8 * payload_bytes(features, outliers, self.bits, self.group) / features
            total_bits.append(bits)
            plan.sites.append(
                Site(
                    node.name, bits=self.bits, outliers=outliers, chosen=self.outliers, group=self.group,
                    algorithm=self.algorithm, crossover=int(link.latency * link.bandwidth), ranges=where,
                    bits_per_value=round(bits, 4), seed=context.seed,
                )
            )  # fmt: skip
        if self.outliers != "none" and not any(int(site["outliers"]) for site in plan.sites):
            widest = max(int(node.meta["val"].shape[-1]) for node in sums)
            why = f"{self.share:g} of {widest} features is less than one"
            refuse_set(self.name, self, ("outliers", "share"), why, hint=f"share of at least 1/{widest}")
            plan.notes.append(f"no feature is sent in bfloat16: {why}")
        plan.notes.append(
            f"{sum(total_bits) / len(total_bits):.4g} bits per value sent, instead of "
            f"{8 * sums[0].meta['val'].dtype.itemsize}"
        )
        if where and not self.group:
            plan.notes.append(self._clipping(program, context, plan, sums))
        return plan

    def _clipping(self, program: Program, context: Context, plan: Plan, sums: list[fx.Node]) -> str:
        """Return a note on how many values are clipped, since averages are below the true extremes."""
        from ...ir.running.execute import interpret
        from .calibration import clipped

        batch = context.batches()[0]
        terms = [arguments(node)["x"] for node in sums]
        values = interpret(program, context.bound(program, batch), record=dict.fromkeys(terms), stop=True)
        shares = []
        for node, term, site in zip(sums, terms, plan.sites, strict=True):
            tables = _tables(site, int(node.meta["val"].shape[-1]), ranks_of(program))
            terms_of_ranks = values[term.name]
            values_of_ranks = terms_of_ranks if isinstance(terms_of_ranks, list) else [terms_of_ranks]
            scales = tables["scales"][: len(values_of_ranks)]
            shares.append(
                clipped(values_of_ranks, scales, tables["order"], int(site["outliers"]), int(site["bits"]))
            )
        return f"clipped: {sum(shares) / len(shares):.3%} of the integers sent, at worst {max(shares):.3%} (one batch)"

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Replace the planned all-reduces."""
        nodes = {n.name: n for n in program.graph.nodes}
        shared: dict[tuple[Any, ...], fx.Node] = {}
        for site in plan.sites:
            node = nodes[site.block]
            if not is_operator(node, "graphopt.all_reduce"):
                raise PipelineError(f"the plan names {site.block}, which is no all-reduce")
            tables = _tables(site, int(node.meta["val"].shape[-1]), ranks_of(program))
            by_sum = {}
            for name, table in tables.items():
                # sites with the same order of features share the table
                key = (name, tuple(table.shape), table.numpy().tobytes())
                if key not in shared:
                    shared[key] = program.edit.add_weight(
                        f"communication.{node.name}.{name}", table, kind="buffer", persistent=True
                    )
                by_sum[name] = shared[key]
            with program.edit.before(node):
                replacement = program.edit.call(
                    torch.ops.graphopt.quantized_all_reduce.default, arguments(node)["x"], by_sum["order"],
                    by_sum["inverse"], by_sum["scales"], by_sum["reduced"], int(site["outliers"]), int(site["bits"]),
                    int(site["group"]), str(site["algorithm"]), int(site["crossover"]), TENSOR_PARALLEL,
                )  # fmt: skip
            program.edit.replace(node, replacement)
        placements(program)


def _tables(site: Site, features: int, ranks: int) -> dict[str, torch.Tensor]:
    """Return the order of features, outliers first, and static scales in that order."""
    outliers, bits, group = int(site["outliers"]), int(site["bits"]), int(site["group"])
    ranges: dict[str, Any] = kept(str(site["ranges"])) if site["ranges"] else {}
    largest = ranges.get(site.block)
    if site["chosen"] == "random":
        generator = torch.Generator().manual_seed(int(site["seed"]))
        first = torch.randperm(features, generator=generator)[:outliers]
    elif site["chosen"] == "calibrated" and largest is not None:
        # the range of a feature is twice the larger of its extremes; the factor does not affect the order
        first = largest.sum(0).topk(outliers).indices
    else:
        first = torch.arange(outliers)
    is_outlier = torch.zeros(features, dtype=torch.bool)
    is_outlier[first] = True
    order = torch.cat([is_outlier.nonzero()[:, 0], is_outlier.logical_not().nonzero()[:, 0]])
    tables = {"order": order, "inverse": order.argsort()}
    if group or largest is None:
        return tables | {"scales": torch.zeros(ranks, 0), "reduced": torch.zeros(0)}
    top = (1 << (bits - 1)) - 1
    quantized = order[outliers:]
    return tables | {
        "scales": (largest[:, quantized] / top).clamp(min=FLOOR),
        "reduced": (ranges[f"{site.block}.sum"][quantized] / top).clamp(min=FLOOR),
    }
