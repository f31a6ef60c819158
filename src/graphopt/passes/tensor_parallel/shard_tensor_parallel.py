"""Tensor parallelism: each rank computes its own heads, share of the width, and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.errors import PassRefusedError, PipelineError
from ...ir.facts import TensorParallel
from ...ir.groups import world_size
from ...ir.needs import ABSENT
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...ir.ranks.placement import placements
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Trial
from ..framework.rollback import may_be_left_out
from ..shared.fused_projections import split_all
from .blocks import Placer, possible_sizes
from .merging import merge_sums

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class ShardTensorParallel(Pass):
    """Shard a model over ranks: attention by heads, feed-forwards by width, MoE layers by width or by expert.

    After Megatron-LM (arXiv 1909.08053): the first projections of a block are sharded by rows, the last by columns,
    and one all-reduce sums the partial results. All ranks have the same graph; each takes its shard of a weight with
    ``local_slice`` and reads nothing else of it. Sharding follows the dataflow back from the last projection, so that
    fused projections (split first), rotary embeddings, norms within heads, position biases, sinks and latent
    attention need no special case; a value that cannot be computed in shards is computed in full and then sharded,
    with a note. If there are more ranks than key-value heads, ranks share heads. Branches that meet in one sum share
    one all-reduce.

    In one process the program runs all its ranks; under torchrun each process runs its own.
    """

    name = "shard-tensor-parallel"
    contract = Exact()
    provides = (TensorParallel,)
    excludes = (TensorParallel,)
    trial = {"size": 2}  # noqa: RUF012
    paper = "arXiv 1909.08053"

    size: int | None = option(
        None, help="number of ranks; if not given, the number of processes", low=1, high=1024
    )
    attention: str = option(
        "shard", help="whether attention is sharded by heads or replicated", choices=("shard", "replicate")
    )
    experts: str = option(
        "auto",
        help="how MoE layers are sharded; auto: by width, or by expert if the width does not divide",
        choices=("auto", "width", "expert", "replicate"),
    )
    embedding: str = option(
        "auto",
        help="shard embedding and head by rows of the vocabulary; auto: if the table exceeds 64 MiB",
        choices=("auto", "replicate", "shard"),
        needs={"huggingface_plan": ABSENT},
    )
    huggingface_plan: str = option(
        "", help="JSON or YAML file with a Hugging Face tensor-parallel plan, which decides what is sharded"
    )

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.size if self.size is not None else world_size()

    def validate(self) -> None:
        """Require a number of ranks, since a program for one rank is hardly intended."""
        if self.size is None and world_size() == 1:
            raise PipelineError(
                f"{self.name}: say how many ranks", hint="size=8, or start several processes with torchrun"
            )

    def plan(self, program: Program, context: Context) -> Plan:
        """Try to shard every block on a copy."""
        kinds = {block.kind for block in program.anatomy.blocks}
        for name in ("attention", "experts"):
            if name not in kinds:
                refuse_set(self.name, self, (name,), f"this program has no block of the kind {name}")
        copy = self.copied(program)
        placer = self._placer(copy)
        plan = placer.plan()
        heads = [r for r in plan.refused if r.block.startswith("attention") and "heads" in r.reason]
        if heads and not any(s.block.startswith("attention") for s in plan.sites):
            sizes = possible_sizes(program)
            raise PassRefusedError(
                f"{self.name}: {heads[0].block}: {heads[0].reason}",
                hint=f"sizes that divide its heads: {', '.join(map(str, sizes))}; "
                "attention=replicate keeps attention replicated on every rank",
            )
        if self.ranks == 1:
            plan.notes.append("one rank: nothing has to be reduced")
        if plan.sites and not placer.failed:
            try:
                self._finish(copy)
            except Exception as error:
                if not may_be_left_out(error):
                    raise
                return plan  # the pipeline finds the failing site and skips it
            plan.trial = Trial(self, program, plan.sites, copy)
        return plan

    def _placer(self, program: Program) -> Placer:
        split_all(program)
        program.facts.add(TensorParallel(self.ranks))
        return Placer(program, self)

    def _finish(self, program: Program) -> None:
        merge_sums(program)
        placements(program)

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Shard the planned sites."""
        placer = self._placer(program)
        for site in plan.sites:
            placer.cut(site)
        self._finish(program)
