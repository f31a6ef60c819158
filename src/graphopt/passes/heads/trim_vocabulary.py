"""Heads with a smaller vocabulary, for outputs that only propose tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import AttachedDraft, EarlyExits, Fact, MaskTokens, MultiTokenHeads, Vocabulary
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import computed, depends_on_weights_alone, drop_unread_weights
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.weights import TensorSource
from ..framework.base import Pass
from ..framework.contracts import NewFunction
from ..framework.plan import Plan, Refused, Site
from .logits import find_head, repeat_way, value_size

if TYPE_CHECKING:
    from ...measure.context import Context

ATTACHED: dict[type[Fact], str] = {AttachedDraft: "draft_logits", MultiTokenHeads: "multi_token_logits"}
"""Proposing outputs, by the fact of the pass that adds them; exits are listed in their fact."""
_PASSING = ("aten.mul", "aten.div", "aten.tanh", "aten.to", "aten.stack")


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Pass):
    """Keep only the rows of the most frequent tokens in a proposing head (VocabTrim, arXiv 2506.22694).

    An attached draft, multi-token heads and exits are trimmed; each gets a matrix of its own with the kept rows only.
    Embeddings and the model's own logits do not change. A program without any of these is assumed to be a draft
    itself, and its own logits are trimmed.

    Tokens are counted in the calibration data, ideally text written by the verifying program.
    ``program.facts[Vocabulary]`` lists the tokens of each trimmed output, in order; generation, evaluation and
    drafting map them back, and removed tokens have probability 0. End, padding and other special tokens of the
    checkpoint are always kept.
    """

    name = "trim-vocabulary"
    contract = NewFunction()
    together = True
    paper = "arXiv 2506.22694"
    provides = (Vocabulary,)
    excludes = (Vocabulary,)
    trial = {"fraction": 0.5}  # noqa: RUF012

    keep: int | None = option(None, help="how many tokens stay", low=1)
    fraction: float | None = option(None, help="share of the tokens that stays", low=0, high=1)

    def validate(self) -> None:
        """Require a count or a fraction."""
        if (self.keep is None) == (self.fraction is None):
            raise PipelineError(
                f"{self.name}: say how many tokens to keep", hint="keep=8192, or fraction=0.25"
            )

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the proposing outputs with the linears that compute them; the program's own logits if there is none."""
        head = find_head(program)
        if isinstance(head, str):
            yield Refused("head", head)
            return
        size = value_size(head.logits)
        attached = [name for fact, name in ATTACHED.items() if fact in program.facts]
        exits = program.facts.get(EarlyExits)
        attached += list(exits.layers) if exits is not None else []
        if not attached and MaskTokens in program.facts:
            yield Refused("logits", "mask tokens propose with the program's own logits")
            return
        for name in attached or ["logits"]:
            if name not in program.outputs:
                yield Refused(name, "it is no output any more; trim-vocabulary comes before take-top-k")
                continue
            linears = _linears(program, program.outputs[name], size)
            if isinstance(linears, str):
                yield Refused(name, linears, program.source_line(program.outputs[name]))
            else:
                yield Site(name, tokens=size), linears

    def plan(self, program: Program, context: Context) -> Plan:
        """Count tokens and choose those that stay."""
        plan = self.findings(program).plan()
        if not plan.sites:
            return plan
        size: int = plan.sites[0]["tokens"]
        count = self.keep if self.keep is not None else max(1, round(size * (self.fraction or 0.0)))
        if count > size:
            raise PassRefusedError(f"{self.name}: the program has {size} tokens, {count} cannot stay")
        counts = count_tokens(context, size)
        if not int(counts.sum()):
            plan.notes.append(
                "no data: the tokens with the smallest numbers stay, the most frequent of most tokenizers"
            )
        special = sorted(t for t in special_tokens(program) if 0 <= t < size)
        if len(special) > count:
            raise PassRefusedError(
                f"{self.name}: {len(special)} special tokens always stay, {count} are fewer"
            )
        ranked = counts.clone()
        ranked[special] = counts.max() + 1
        kept = ranked.argsort(descending=True, stable=True)[:count].sort().values.tolist()
        if int(counts.sum()):
            plan.notes.append(
                f"{float(counts[kept].sum() / counts.sum()):.1%} of the tokens counted are among them"
            )
        if count == size:
            plan.notes.append("all tokens stay: there is nothing to trim")
        elif [site.block for site in plan.sites] == ["logits"]:
            plan.notes.append("nothing is attached that proposes: the program itself is now a draft")
        plan.sites = [Site(site.block, tokens=size, kept=kept) for site in plan.sites]
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Give each output matrices with the kept rows only."""
        chosen = [c for c in self.chosen(program, plan) if len(c[0]["kept"]) < int(c[0]["tokens"])]
        sites = [site for site, _ in chosen]
        if not sites:
            return
        first = sites[0]
        if any(site["kept"] != first["kept"] for site in sites):
            raise PipelineError(
                f"{self.name}: the plan keeps other tokens for {sites[-1].block} than for {first.block}",
                hint="one list of tokens serves all outputs",
            )
        for site, linears in chosen:
            _trim(program, site.block, linears, [int(t) for t in site["kept"]])
        ids, outputs = tuple(int(t) for t in first["kept"]), tuple(site.block for site in sites)
        program.facts.add(Vocabulary(int(first["tokens"]), ids, outputs))
        block_export(program, "a folder has one vocabulary for its embedding and its head")


def count_tokens(context: Context, size: int) -> torch.Tensor:
    """Return how often each token comes up in the data, (size,), padding left out."""
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in context.data or []:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is not None:
            tokens = (ids if mask is None else ids[mask.bool()]).reshape(-1)
            counts += tokens.bincount(minlength=size)[:size]
    return counts


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor, read when they are loaded."""

    source: TensorSource
    ids: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ids), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load().index_select(0, torch.tensor(self.ids))


def _linears(program: Program, output: fx.Node, size: int) -> list[fx.Node] | str:
    """Return the linears that compute logits, or why they cannot be trimmed."""
    constant = depends_on_weights_alone(program)
    linears: dict[fx.Node, None] = {}
    work = [output]
    while work:
        node = work.pop()
        value = node.meta["val"]
        if not value.dim() or value.shape[-1] != size:
            continue
        if is_operator(node, "aten.linear"):
            if any(arguments(node)[n] not in (None, *constant) for n in ("weight", "bias")):
                return f"{node.name} multiplies with something that depends on the input"
            linears[node] = None
        elif node in constant:
            return f"{node.name} is a weight of every token"
        elif is_operator(node, "aten.stack") and int(arguments(node)["dim"]) % value.dim() == value.dim() - 1:
            return "heads are stacked over tokens"
        elif not is_operator(node, *_PASSING):
            return f"what follows the head, {node.name}, may depend on how many tokens there are"
        else:
            work += node.all_input_nodes
    return list(linears) if linears else "no linear makes its logits"


def _trim(program: Program, name: str, linears: list[fx.Node], kept: Sequence[int]) -> None:
    output = program.outputs[name]
    now: dict[fx.Node, fx.Node] = {}
    trimmed: dict[fx.Node, fx.Node] = {}
    for linear in linears:
        operands = dict(arguments(linear))
        for name_of_operand in ("weight", "bias"):
            if operands[name_of_operand] is not None:
                if operands[name_of_operand] not in trimmed:
                    trimmed[operands[name_of_operand]] = _trimmed_weight(
                        program, name, operands[name_of_operand], kept
                    )
                operands[name_of_operand] = trimmed[operands[name_of_operand]]
        with program.edit.before(linear):
            args, kwargs = normal_call(linear.target, operands)
            now[linear] = program.edit.call(linear.target, *args, **kwargs)
    order = list(program.graph.nodes)
    with program.edit.after(output):
        repeat_way(program, order[: order.index(output) + 1], now)
    outputs = dict(program.outputs)
    program.edit.set_outputs([now[output] if n == name else value for n, value in outputs.items()])
    program.edit.erase_dead([output])
    for tensor in [n for n, node in program.checkpoint.items() if node in trimmed and not node.users]:
        # export to a folder is blocked, so no unused matrix has to be kept for it
        del program.checkpoint[tensor]
    drop_unread_weights(program)


def _trimmed_weight(program: Program, output: str, tensor: fx.Node, kept: Sequence[int]) -> fx.Node:
    """Add the kept rows of a head's matrix or bias, under a name that training recipes recognise."""
    weight = program.weights.get(tensor.name)
    source = weight.source if weight is not None else computed(program, tensor)[0]
    name = weight.name if weight is not None else tensor.name
    prefix = "draft." if output == ATTACHED[AttachedDraft] and not name.startswith("draft.") else ""
    stem = (
        f"{prefix}{name}"
        if name.startswith(("multi_token_heads.", "draft.")) or prefix
        else f"{output}.{name}"
    )
    return program.edit.add_weight(f"{stem}.kept", _Rows(source, tuple(kept)))


def special_tokens(program: Program) -> set[int]:
    """Return the special tokens of a checkpoint: begin, end, padding, and those that its tokenizer adds."""
    ids: set[int] = set()
    assets = program.origin.assets
    settings: list[Any] = [program.origin.config]
    for name in ("generation_config.json", "tokenizer.json"):
        if name in assets:
            try:
                settings.append(json.loads(assets[name]))
            except ValueError:
                continue
    for setting in settings:
        for key, value in setting.items():
            if key.endswith("_token_id"):
                ids.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
        added = setting.get("added_tokens")
        if isinstance(added, list):
            ids.update(t["id"] for t in added if isinstance(t, dict) and isinstance(t.get("id"), int))
    return ids
