"""The number of active experts of a mixture-of-experts layer as a run-time setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export, export_blockers, unblock_export
from ...ir.facts import AdjustableExperts, note_checkpoint
from ...ir.option import option
from ...ir.program import Dial, Program
from ...ir.running.region import cut, drawn_source, leaf_value
from ...ir.schema import arguments, is_operator, normal_call
from ..framework.base import Pass
from ..framework.contracts import Approximate, Contract, ExactAt
from ..framework.plan import Plan, Refused, Site

if TYPE_CHECKING:
    from ...measure.context import Context

composites = torch.ops.graphopt
DIAL = "active_experts"
DIALLED = (
    "the number of active experts is a run-time setting, for which a configuration has no entry; "
    "freeze-dial makes it one number"
)
UNEVEN = "MoE layers have different numbers of active experts, for which the configuration has one entry"


@dataclass(frozen=True, kw_only=True)
class DialTopK(Pass):
    """Make the number k of experts per token a run-time setting, from 1 to the trained number (arXiv 2509.23012).

    ``program(..., active_experts=k)``; the default is the trained number, at which nothing changes. Experts beyond k
    are not computed. If the model divides routing weights by their sum, the remaining weights are normalised too, as
    in a model with that k; if it does not, the layer adds less as k falls, and a note says so. ``fixed`` writes one k
    into the program, which becomes an entry in the configuration of a Hugging Face folder.
    """

    name = "dial-top-k"
    contract = ExactAt("active_experts", float("nan"))
    paper = "arXiv 2509.23012"
    provides = (AdjustableExperts,)
    excludes = (AdjustableExperts,)

    fixed: int | None = option(None, help="this fixed k instead of a run-time setting", low=1)
    per_layer: bool = option(
        False, help="a setting for each MoE layer: active_experts_0, active_experts_1, ..."
    )

    def validate(self) -> None:
        """Require that ``fixed`` and ``per_layer`` are not used together."""
        if self.fixed is not None and self.per_layer:
            raise PipelineError(f"{self.name}: fixed and per_layer exclude one another")

    def promises(self) -> Contract:
        """Return a contract that is exact at the trained number; with ``fixed`` it is approximate."""
        return Approximate() if self.fixed is not None else self.contract

    def plan(self, program: Program, context: Context) -> Plan:
        """Take every MoE layer whose experts are the direct result of a top-k."""
        plan = self.findings(program).plan()
        unnormalised = [site.block for site in plan.sites if not site["renormalised"]]
        if unnormalised:
            plan.notes.append(
                f"{', '.join(unnormalised)}: routing weights are not divided by their sum, so the MoE layer adds less "
                "with fewer experts"
            )
        return plan

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield every MoE layer whose experts are the direct result of a top-k."""
        for block in program.anatomy.experts:
            reason, most = _trained_count(program, block)
            if reason:
                yield Refused(block.name, reason, program.source_line(block.term))
                continue
            if self.fixed is not None and self.fixed > most:
                raise PassRefusedError(
                    f"{self.name}: {block.name} was trained with {most} active experts, {self.fixed} are more"
                )
            yield Site(block.name, most=most, renormalised=_is_normalised(program, block)), block

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Limit the experts of the MoE layers that the plan names."""
        if not plan.sites:
            return
        chosen, layer_count = self.chosen(program, plan), len(program.anatomy.experts)
        shared: fx.Node | None = None
        if self.fixed is not None and plan.sites:
            value = torch.tensor(float(self.fixed), dtype=torch.float64)
            shared = program.edit.add_weight(DIAL, value, kind="constant", persistent=False)
        elif not self.per_layer and plan.sites:
            most = max(int(site["most"]) for site in plan.sites)
            shared = program.add_dial(DIAL, Dial(float(most), 1.0, float(most), "experts a token goes to"))
        for number, (site, block) in enumerate(chosen):
            most = int(site["most"])
            k = shared
            if k is None:
                k = program.add_dial(
                    f"{DIAL}_{number}",
                    Dial(float(most), 1.0, float(most), f"experts a token goes to in {site.block}"),
                )
            _limit(program, block, k, bool(site["renormalised"]))
        counts = {int(site["most"]) for site in plan.sites}
        if self.fixed is not None and len(counts) == 1 and len(plan.sites) == layer_count:
            note_checkpoint(program, active_experts=(counts.pop(), self.fixed))
        else:
            block_export(program, DIALLED if self.fixed is None else UNEVEN)

    @classmethod
    def dial_frozen(cls, program: Program, dial: str, value: float) -> None:
        """Record the number of active experts for a folder's configuration once all MoE layers have one frozen number."""
        # by what it is not, since programs that were saved before have other words for it
        if not dial.startswith(DIAL) or not set(export_blockers(program).get(cls.name, ())) - {UNEVEN}:
            return
        limited_nodes = [n for n in program.nodes if is_operator(n, "graphopt.active_weights")]
        limits = [arguments(n)["k"] for n in limited_nodes]
        if any(k.name not in program.weights for k in limits):
            return
        numbers = {float(program.weights[k.name].source.load()) for k in limits}
        active = {int(b.sizes["active"]) for b in program.anatomy.experts}
        unblock_export(program, by=cls.name)
        if len(limited_nodes) == len(program.anatomy.experts) and len(numbers) == len(active) == 1:
            number = numbers.pop()
            if number.is_integer():
                note_checkpoint(program, active_experts=(active.pop(), int(number)))
                return
        block_export(program, UNEVEN, by=cls.name)


def _trained_count(program: Program, block: Block) -> tuple[str, int]:
    core = block.parts.get("core")
    if core is None:
        return "its experts were not recognised as one operator", 0
    if block.parts.get("router") is None:
        return "its router was not recognised", 0
    chosen = arguments(core)["experts"]
    most = int(chosen.meta["val"].shape[-1])
    top = is_operator(chosen, "getitem") and chosen.args[1] == 1 and is_operator(chosen.args[0], "aten.topk")
    if not top and not _is_ranked(program, block, most):
        return "its experts come neither from a top-k nor in the order of its router's scores", 0
    return "", most


def _is_ranked(program: Program, block: Block, most: int) -> bool:
    """Tell whether experts are sorted by score, by choosing some for random scores."""
    experts, scores = _from_random_scores(program, block, "experts")
    return torch.equal(experts, scores.topk(most).indices)


def _from_random_scores(program: Program, block: Block, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    router = block.parts["router"]
    region = cut(program, [arguments(block.parts["core"])[what]], lambda node: node is router)
    sizes = {name: limits.hint for name, limits in program.signature.sizes.items()}
    values = {node.name: leaf_value(program, node, sizes, seed) for seed, node in enumerate(region.leaves)}
    (result,) = region.run(values, lambda node: drawn_source(node, 1).load())
    return result, values[router.name]


def _is_normalised(program: Program, block: Block) -> bool:
    """Tell whether routing weights have the same sum for all tokens, by computing some from random logits."""
    weights, _ = _from_random_scores(program, block, "weights")
    sums = weights.sum(-1)
    return bool((sums - sums.mean()).abs().max() <= 1e-9 * sums.abs().max())


def _limit(program: Program, block: Block, k: fx.Node, renormalised: bool) -> None:
    core = block.parts["core"]
    _sort_top_k(program, arguments(core)["experts"])
    call_args = dict(arguments(core))
    call = program.edit.call
    absent = int(call_args["up"].meta["val"].shape[0])
    existing = [n for n in program.weight_nodes if program.weights[n.name].name == "first_expert"]
    first = existing[0] if existing else program.edit.add_weight(
        "first_expert", torch.zeros(1, dtype=torch.int64), kind="constant", persistent=False
    )  # fmt: skip
    with program.edit.before(core):
        call_args["experts"] = call(composites.active_experts.default, call_args["experts"], k, absent)
        call_args["weights"] = call(composites.active_weights.default, call_args["weights"], k, renormalised)
        if call_args["first"] is None:
            call_args["first"] = first
        args, kwargs = normal_call(core.target, call_args)
        new_core = call(core.target, *args, **kwargs)
    program.edit.replace(core, new_core)


def _sort_top_k(program: Program, experts: fx.Node) -> None:
    """Let a top-k return experts sorted by score if it may return them in any order; no reader relies on the order."""
    top = experts.args[0]
    if not (is_operator(experts, "getitem") and isinstance(top, fx.Node)):
        return
    call_args = dict(arguments(top))
    if call_args.get("sorted") is not False:
        return
    call_args["sorted"] = True
    args, kwargs = normal_call(top.target, call_args)
    with program.edit.before(top):
        new_top = program.edit.call(top.target, *args, **kwargs)
    program.edit.replace(top, new_top)
