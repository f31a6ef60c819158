"""A head that knows fewer tokens, for programs that only propose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..ir.errors import PassRefusedError, PipelineError
from ..ir.export_blockers import block_export
from ..ir.option import option
from ..ir.program import Program
from ..ir.schema import arguments, is_operator, normal_call
from .base import Pass
from .contracts import NewFunction
from .heads import Head, find_head, repeat_way
from .plan import Plan, Refused, Site

if TYPE_CHECKING:
    from .context import Context

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Pass):
    """Keep the rows of the head of the tokens that come up most; the embedding stays whole (VocabTrim, arXiv 2506.22694).

    Tokens are counted in the calibration data, best text that the deciding program wrote. Logits are then of
    ``keep`` tokens, and ``program.facts["vocabulary"]["ids"]`` says which, in order; the draft strategy maps them back.
    End, padding and other special tokens of the checkpoint always stay. Only for drafts: what the head no longer
    knows it never says.
    """

    name = "trim-vocabulary"
    contract = NewFunction()
    together = True
    paper = "arXiv 2506.22694"
    provides = ("trimmed_vocabulary",)
    excludes = ("trimmed_vocabulary",)
    trial = {"fraction": 0.5}  # noqa: RUF012

    keep: int | None = option(None, help="how many tokens stay", low=1)
    fraction: float | None = option(None, help="share of the tokens that stays", low=0, high=1)

    def validate(self) -> None:
        """One way of saying how many."""
        if (self.keep is None) == (self.fraction is None):
            raise PipelineError(f"{self.name}: say how many tokens stay", hint="keep=8192, or fraction=0.25")

    def plan(self, program: Program, context: Context) -> Plan:
        """Count tokens."""
        plan = Plan()
        head = find_head(program)
        if isinstance(head, str):
            plan.refused.append(Refused("head", head, ""))
            return plan
        after = [n for n in head.way if n is not head.projection and head.projection in _ancestors(n)]
        mixing = [n for n in after if not is_operator(n, "aten.mul", "aten.div", "aten.tanh", "aten.to")]
        if mixing:
            plan.refused.append(
                Refused(mixing[0].name, "what follows the head may depend on how many tokens there are", "")
            )
            return plan
        size = int(head.logits.meta["val"].shape[-1])
        wanted = self.keep if self.keep is not None else max(1, round(size * (self.fraction or 0.0)))
        if wanted > size:
            raise PassRefusedError(f"{self.name}: the program has {size} tokens, {wanted} cannot stay")
        counts = torch.zeros(size, dtype=torch.int64)
        for batch in context.data or []:
            ids, mask = batch.get("input_ids"), batch.get("attention_mask")
            if ids is not None:
                counts += (
                    (ids if mask is None else ids[mask.bool()]).reshape(-1).bincount(minlength=size)[:size]
                )
        if not int(counts.sum()):
            plan.notes.append(
                "no data: the tokens with the smallest numbers stay, the most frequent of most tokenizers"
            )
        special = sorted(t for t in special_tokens(program) if 0 <= t < size)
        if len(special) > wanted:
            raise PassRefusedError(
                f"{self.name}: {len(special)} special tokens always stay, {wanted} are fewer"
            )
        ranked = counts.clone()
        ranked[special] = counts.max() + 1
        kept = ranked.argsort(descending=True, stable=True)[:wanted].sort().values.tolist()
        if int(counts.sum()):
            plan.notes.append(
                f"{float(counts[kept].sum() / counts.sum()):.1%} of the tokens counted are among them"
            )
        plan.sites.append(Site("head", tokens=size, kept=kept))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Take the rows out of the head that the plan does not name."""
        for site in plan.sites:
            head = find_head(program)
            assert isinstance(head, Head)
            kept = [int(t) for t in site["kept"]]
            index = program.edit.add_weight(
                "vocabulary_kept", torch.tensor(kept), kind="constant", persistent=False
            )
            found = dict(arguments(head.projection))
            now: dict[torch.fx.Node, torch.fx.Node] = {}
            with program.edit.before(head.projection):
                for name in ("weight", "bias"):
                    if found.get(name) is not None:
                        found[name] = program.edit.call(aten.index_select.default, found[name], 0, index)
                args, kwargs = normal_call(head.projection.target, found)
                now[head.projection] = program.edit.call(head.projection.target, *args, **kwargs)
            with program.edit.after(head.way[-1]):
                repeat_way(program, head.way, now)
            program.edit.replace(head.logits, now[head.logits], same=False, record=False)
            program.edit.set_outputs([now.get(n, n) for n in program.outputs.values()])
            program.facts["vocabulary"] = {"size": int(site["tokens"]), "ids": kept}
            block_export(program, "a folder has one vocabulary for its embedding and its head")


def special_tokens(program: Program) -> set[int]:
    """Return the tokens that a checkpoint names: begin, end, padding, and what its tokenizer adds."""
    found: set[int] = set()
    assets = program.origin.assets
    settings: list[Any] = [program.origin.config]
    for name in ("generation_config.json", "tokenizer.json"):
        if name in assets:
            try:
                settings.append(json.loads(assets[name]))
            except ValueError:
                continue
    for given in settings:
        for key, value in given.items():
            if key.endswith("_token_id"):
                found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
        added = given.get("added_tokens")
        if isinstance(added, list):
            found.update(t["id"] for t in added if isinstance(t, dict) and isinstance(t.get("id"), int))
    return found


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    seen: set[torch.fx.Node] = set()
    work = [node]
    while work:
        for used in work.pop().all_input_nodes:
            if used not in seen:
                seen.add(used)
                work.append(used)
    return seen
