"""The number of active experts of a mixture, chosen when the program runs."""

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

dialect = torch.ops.graphopt
DIAL = "active_experts"
DIALLED = (
    "the number of active experts is a dial, which a configuration has not; freeze-dial makes it one number"
)
UNEVEN = "mixtures have different numbers of active experts, for which the configuration has one entry"


@dataclass(frozen=True, kw_only=True)
class DialTopK(Pass):
    """Let the number k of experts that a token goes to be a dial, from 1 to the trained number (arXiv 2509.23012).

    ``program(..., active_experts=k)``; left out, the trained number, at which nothing changes. Experts beyond k are not
    computed. Where the model divides routing weights by their sum, those that are left are scaled to it, as a model with
    that k would; where it does not, the mixture adds less as k falls, and a note says so. ``fixed`` writes one k into the
    program, which a Hugging Face folder then has for its own setting.
    """

    name = "dial-top-k"
    contract = ExactAt("active_experts", float("nan"))
    paper = "arXiv 2509.23012"
    provides = (AdjustableExperts,)
    excludes = (AdjustableExperts,)

    fixed: int | None = option(None, help="this k, for good, instead of a dial", low=1)
    per_layer: bool = option(False, help="a dial for each mixture: active_experts_0, active_experts_1, ...")

    def validate(self) -> None:
        """A number that is fixed needs no dials."""
        if self.fixed is not None and self.per_layer:
            raise PipelineError(f"{self.name}: fixed and per_layer exclude one another")

    def promises(self) -> Contract:
        """Exact where the dial stands at the trained number."""
        return Approximate() if self.fixed is not None else self.contract

    def plan(self, program: Program, context: Context) -> Plan:
        """Take every mixture whose experts come straight from a top-k."""
        plan = self.findings(program).plan()
        loose = [site.block for site in plan.sites if not site["renormalised"]]
        if loose:
            plan.notes.append(
                f"{', '.join(loose)}: routing weights are not divided by their sum, so the mixture adds less "
                "with fewer experts"
            )
        return plan

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield every mixture whose experts come straight from a top-k."""
        for block in program.anatomy.experts:
            reason, most = _most(program, block)
            if reason:
                yield Refused(block.name, reason, program.source_line(block.term))
                continue
            if self.fixed is not None and self.fixed > most:
                raise PassRefusedError(
                    f"{self.name}: {block.name} was trained with {most} active experts, {self.fixed} are more"
                )
            yield Site(block.name, most=most, renormalised=_normalised(program, block)), block

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Limit the experts of the mixtures that the plan names."""
        if not plan.sites:
            return
        chosen, mixtures = self.chosen(program, plan), len(program.anatomy.experts)
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
        if self.fixed is not None and len(counts) == 1 and len(plan.sites) == mixtures:
            note_checkpoint(program, active_experts=(counts.pop(), self.fixed))
        else:
            block_export(program, DIALLED if self.fixed is None else UNEVEN)

    @classmethod
    def dial_frozen(cls, program: Program, dial: str, value: float) -> None:
        """Let a folder have the number at which all mixtures stand for its own setting, once no dial is left."""
        if not dial.startswith(DIAL) or DIALLED not in export_blockers(program).get(cls.name, ()):
            return
        limited = [n for n in program.nodes if is_operator(n, "graphopt.active_weights")]
        limits = [arguments(n)["k"] for n in limited]
        if any(k.name not in program.weights for k in limits):
            return
        numbers = {float(program.weights[k.name].source.load()) for k in limits}
        active = {int(b.sizes["active"]) for b in program.anatomy.experts}
        unblock_export(program, by=cls.name)
        if len(limited) == len(program.anatomy.experts) and len(numbers) == len(active) == 1:
            number = numbers.pop()
            if number.is_integer():
                note_checkpoint(program, active_experts=(active.pop(), int(number)))
                return
        block_export(program, UNEVEN, by=cls.name)


def _most(program: Program, block: Block) -> tuple[str, int]:
    core = block.parts.get("core")
    if core is None:
        return "its experts were not recognised as one operator", 0
    if block.parts.get("router") is None:
        return "its router was not recognised", 0
    chosen = arguments(core)["experts"]
    most = int(chosen.meta["val"].shape[-1])
    top = is_operator(chosen, "getitem") and chosen.args[1] == 1 and is_operator(chosen.args[0], "aten.topk")
    if not top and not _ranked(program, block, most):
        return "its experts come neither from a top-k nor in the order of its router's scores", 0
    return "", most


def _ranked(program: Program, block: Block, most: int) -> bool:
    """Tell whether experts come best first, by choosing some for random scores."""
    found, scores = _from_random_scores(program, block, "experts")
    return torch.equal(found, scores.topk(most).indices)


def _from_random_scores(program: Program, block: Block, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    router = block.parts["router"]
    region = cut(program, [arguments(block.parts["core"])[what]], lambda node: node is router)
    sizes = {name: limits.hint for name, limits in program.signature.sizes.items()}
    values = {node.name: leaf_value(program, node, sizes, seed) for seed, node in enumerate(region.leaves)}
    (found,) = region.run(values, lambda node: drawn_source(node, 1).load())
    return found, values[router.name]


def _normalised(program: Program, block: Block) -> bool:
    """Tell whether routing weights have the same sum for all tokens, by computing some from random logits."""
    found, _ = _from_random_scores(program, block, "weights")
    sums = found.sum(-1)
    return bool((sums - sums.mean()).abs().max() <= 1e-9 * sums.abs().max())


def _limit(program: Program, block: Block, k: fx.Node, renormalised: bool) -> None:
    core = block.parts["core"]
    _best_first(program, arguments(core)["experts"])
    found = dict(arguments(core))
    call = program.edit.call
    absent = int(found["up"].meta["val"].shape[0])
    zero = [n for n in program.weight_nodes if program.weights[n.name].name == "first_expert"]
    first = zero[0] if zero else program.edit.add_weight(
        "first_expert", torch.zeros(1, dtype=torch.int64), kind="constant", persistent=False
    )  # fmt: skip
    with program.edit.before(core):
        found["experts"] = call(dialect.active_experts.default, found["experts"], k, absent)
        found["weights"] = call(dialect.active_weights.default, found["weights"], k, renormalised)
        if found["first"] is None:
            found["first"] = first
        args, kwargs = normal_call(core.target, found)
        made = call(core.target, *args, **kwargs)
    program.edit.replace(core, made)


def _best_first(program: Program, experts: fx.Node) -> None:
    """Let the best come first where a top-k may give them in any order, which then nobody can rely on."""
    top = experts.args[0]
    if not (is_operator(experts, "getitem") and isinstance(top, fx.Node)):
        return
    given = dict(arguments(top))
    if given.get("sorted") is not False:
        return
    given["sorted"] = True
    args, kwargs = normal_call(top.target, given)
    with program.edit.before(top):
        made = program.edit.call(top.target, *args, **kwargs)
    program.edit.replace(top, made)
