"""Incremental decoding: what earlier tokens leave behind is kept in caches and states, which are inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.checking.report import PassReport
from ...ir.compat import surely_equal
from ...ir.errors import ContractError, PassRefusedError, UsageError, VerificationError
from ...ir.export_blockers import block_export
from ...ir.facts import CrossCache, KVCache, StateCache, Streaming
from ...ir.inputs import add_input, limit_size, remove_input
from ...ir.operators.placement_types import WHOLE, Placement, Shard
from ...ir.operators.traits import Trait, has
from ...ir.option import option
from ...ir.program import Program
from ...ir.ranks.placement import placements
from ...ir.ranks.rank_programs import ON_RANKS, ranks_of
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.signature import SizeRange
from ..framework.base import Pass
from ..framework.contracts import ExactInChunks
from ..framework.plan import Plan, Refused, Site, Trial
from .comparing import compare_with_cache
from .latents import attend_to_latents, latent_of
from .pairs import PairCaches, of_query, pairs_of
from .positions import AtCapacity, Decoder, NotCausal, logits_of, rows_of_positions, size_of_input, tokens_of
from .reducing import reduced
from .states import drop_padding, insert_states, states_needed

if TYPE_CHECKING:
    from ...measure.context import Context

aten, composites = torch.ops.aten, torch.ops.graphopt
NO_FOLDER = "a program with a cache has inputs that no checkpoint names; export it before insert-cache"


@dataclass(frozen=True, kw_only=True)
class InsertCache(Pass):
    """Store what earlier tokens leave behind, so that following tokens are computed alone.

    The program takes new tokens and their ``position_ids`` (batch, tokens), and for each attention ``key_cache_0``,
    ``value_cache_0``, ... (batch, key-value heads, capacity, size), and returns ``next_key_cache_0``, ... Convolutions
    and linear attention (state space layers, gated delta rules) keep states of one size: ``conv_state_0``, ... (batch,
    channels, taps - 1) and ``recurrent_state_0``, ... (batch, heads, key size, value size), which count the tokens that
    are ``taken`` (batch, tokens), the first ones of each row. One program serves the prompt and every later token; rows
    may be at different positions. There is no padding: rows begin at position 0, and padding masks are removed from the
    inputs. With ``tree``, inputs define the slots in which the tokens of a step are stored and which of them see one
    another.
    """

    name = "insert-cache"
    contract = ExactInChunks()
    together = True
    provides = (KVCache,)
    excludes = (KVCache, Streaming)

    max_length: int | None = option(
        None, help="fixed number of slots of each cache; by default that of the given caches", low=2
    )
    tree: bool = option(
        False, help="inputs cache_slots and step_mask, for several candidates that share a position"
    )
    latents: bool = option(
        True,
        help="store the latents that keys and values are projected from, where caches become smaller by it",
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the keys and values to store, and test the result in chunks."""
        plan = self.findings(program).plan()
        if plan.refused:
            return replace(plan, sites=[])
        failed = self._trial(program, plan)
        if failed is not None:
            plan.refused.append(failed)
            plan.sites, plan.trial = [], None
        return plan

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the sites, or why the program cannot have a cache."""
        try:
            decoder = Decoder(program)
            sites, limit = _sites(decoder), decoder.limit()
            if not any("key" in site.choices for site in sites) and self.max_length is not None:
                yield Refused(
                    "max_length",
                    "no attention stores keys: states have one size, whatever the length of the text",
                )
                return
        except NotCausal as problem:
            yield Refused(problem.node.name, str(problem), program.source_line(problem.node))
            return
        if limit is not None and self.max_length is not None and self.max_length > limit:
            yield Refused("max_length", _too_long(limit, self.max_length))
            return
        for site in sites:
            yield site, None

    def _trial(self, program: Program, plan: Plan) -> Refused | None:
        """Run both programs, so that mixing of tokens outside of attention shows in the values.

        A program that is too large to run is replaced by a small one with the same kinds of layers.
        """
        small = reduced(program)
        trial = self.copied(program if small is None else small)
        try:
            self._insert(trial)
            worst = None if small is None else compare_with_cache(small, trial)
            if small is None or small is program:
                plan.trial = Trial(self, program, plan.sites, trial)
        except (RuntimeError, IndexError) as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            return Refused("inputs", f"it cannot be computed piece by piece: {reason}", "")
        except (VerificationError, UsageError, NotCausal) as problem:
            node = getattr(problem, "node", None)
            name = node.name if isinstance(node, fx.Node) else str(node or "inputs")
            text = getattr(problem, "message", str(problem))
            return Refused(name, text, program.source_line(node) if isinstance(node, fx.Node) else "")
        if worst is None or worst.error <= ExactInChunks.limit:
            return None
        return Refused(
            worst.name,
            f"results in chunks differ by {worst.error:.1g}: tokens are mixed outside of attention",
            "",
        )

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Insert a cache before each attention; one without a cache would see new tokens only.

        Raises:
            PassRefusedError: the plan omits attentions, or contradicts the program.
            KeyError: it names attentions that do not exist.
        """
        if not plan.sites:
            return
        findings = self.findings(program)
        for refused in findings.refused:
            raise PassRefusedError(f"{self.name}: {refused.block}: {refused.reason}", node=refused.block)
        sites = {site.block: site for site in findings.sites}
        planned = {site.block: site for site in plan.sites}
        missing = [name for name in sites if name not in planned]
        for name, site in planned.items():
            if site != sites[name]:
                raise PassRefusedError(
                    f"{self.name}: the plan has {site} where the program has {sites[name]}",
                    hint="the contents of a cache follow from the program; plan again",
                )
        if missing:
            raise PassRefusedError(
                f"{self.name}: the plan leaves out {', '.join(missing)}: without a cache an attention sees new tokens "
                "and nothing before them",
                hint="take all of its sites, or none",
            )
        try:
            self._insert(program)
        except NotCausal as problem:
            raise PassRefusedError(f"{self.name}: {problem.node.name}: {problem}") from problem

    def _insert(self, program: Program) -> None:
        findings = self.findings(program)
        decoder = Decoder(program)
        limit = decoder.limit()
        for refused in findings.refused:
            at = next((n for n in program.graph.nodes if n.name == refused.block), decoder.tokens)
            raise NotCausal(at, refused.reason)
        pairs = [(s["key"], s["value"]) for s in findings.sites if "key" in s.choices]
        pairs_of_bias = pairs_of(decoder, program.graph.nodes)
        if pairs_of_bias and self.tree:
            raise NotCausal(
                next(iter(pairs_of_bias)),
                "it picks keys by what tokens compute for pairs, which trees do not say",
            )
        states = list(states_needed(decoder))
        if states:
            drop_padding(decoder)
        nodes = {n.name: n for n in program.graph.nodes}
        batch, tokens = decoder.tokens.meta["val"].shape[:2]
        step_mask = taken = None
        _read_from_encoder(program, decoder)
        if states:
            taken = add_input(
                program,
                "taken",
                [batch, tokens],
                torch.bool,
                fill=("ones", str(decoder.tokens.meta["input"])),
            )
        if self.tree:
            step_mask = add_input(program, "step_mask", [batch, tokens, tokens], torch.bool)
        named: list[str] = []
        if taken is not None:
            named = insert_states(program, decoder, states, batch, taken, step_mask)
            program.facts.add(StateCache(tuple(named), str(taken.meta["input"])))
        still = {value: users for value, users in decoder.still().items() if value not in (taken, step_mask)}
        if not pairs:
            self._without_caches(program, decoder, still)
            return
        if self.latents:
            pairs = _with_latents(program, decoder, pairs)
            nodes = {n.name: n for n in program.graph.nodes}
        positions = _positions(program, decoder)
        slots = positions
        if self.tree:
            slots = add_input(program, "cache_slots", [batch, tokens], torch.int64)
        capacity: Any = self.max_length
        if capacity is None:
            capacity = program.add_size("capacity", SizeRange(1, limit, min(32, limit or 32)))
        caches = [
            self._caches(program, number, nodes[k], nodes[v], batch, capacity)
            for number, (k, v) in enumerate(pairs)
        ]
        # what reads the tokens stays; a mask that comes before it may go
        first = next(n for n in program.graph.nodes if n.op == "call_function" and n in decoder.moving)
        with program.edit.before(first):
            length = (
                capacity
                if isinstance(capacity, int)
                else program.edit.call(aten.sym_size.int, caches[0][0], 2)
            )
        stored = {}
        for (k, v), pair in zip(pairs, caches, strict=True):
            kept = [
                _stored(program, cache, nodes[name], slots, f"next_{cache.meta['input']}")
                for cache, name in zip(pair, (k, v), strict=False)
            ]
            stored[k, v] = (kept[0], kept[-1])
        tables = AtCapacity(decoder, length)
        pair_caches = PairCaches(program, decoder, tables, positions, slots, batch, capacity, first)
        stores: dict[Any, fx.Node] = {}
        for node in [n for n in program.graph.nodes if is_operator(n, "graphopt.attention")]:
            operands = dict(arguments(node))
            if (operands["k"].name, operands["v"].name) not in stored:
                continue
            key, value = stored[operands["k"].name, operands["v"].name]
            if operands["window"] not in stores:
                with program.edit.before(first):
                    stores[operands["window"]] = program.edit.call(
                        composites.cache_visible.default,
                        positions,
                        slots,
                        caches[0][0],
                        step_mask,
                        window=operands["window"],
                    )
            bias = operands["bias"]
            if bias in pairs_of_bias:
                bias = pair_caches.bias(pairs_of_bias[bias], node)
            elif isinstance(bias, fx.Node) and not of_query(decoder, bias):
                bias = self._bias(program, tables, bias, positions, slots, first)
            operands.update(
                k=key, v=value, key_mask=None, bias=bias, segments=None, visible=stores[operands["window"]],
                causal=False, window=None,
            )  # fmt: skip
            with program.edit.before(node):
                args, kwargs = normal_call(node.target, operands)
                replacement = program.edit.call(node.target, *args, **kwargs)
            program.edit.replace(node, replacement, record=False)
        for value, users in still.items():
            remaining = [u for u in users if not u._erased and value in u.all_input_nodes]
            if not remaining or value._erased or decoder.ignores_tokens(value):
                continue
            if not decoder.follows_positions(value):
                self._token_wise(program, decoder, tables, value, remaining, positions, first)
        _drop_masks(program, decoder, keep=decoder.positions[:1])
        limit_size(program, program.symbols[decoder.sequence], 1, self.max_length)
        program.facts.add(
            KVCache(
                capacity=self.max_length if self.max_length is not None else "capacity",
                layers=len(pairs),
                tree=self.tree,
                tokens=str(decoder.tokens.meta["input"]),
                positions=str(positions.meta["input"]),
                limit=limit,
                logits=logits_of(program),
            )
        )
        block_export(program, NO_FOLDER, by=self.name)

    def _without_caches(
        self, program: Program, decoder: Decoder, still: dict[fx.Node, list[fx.Node]]
    ) -> None:
        """Finish a program in which nothing is kept token by token."""
        for value, users in still.items():
            remaining = [u for u in users if not u._erased and value in u.all_input_nodes]
            if not remaining or value._erased or decoder.ignores_tokens(value):
                continue
            if not decoder.follows_positions(value):
                raise NotCausal(
                    value, "it depends on where tokens stand, and no attention has a cache of positions"
                )
        limit = decoder.limit()
        read = [n for n in decoder.positions if n.users]
        positions = str(_positions(program, decoder).meta["input"]) if read else ""
        _drop_masks(program, decoder, keep=read[:1])
        limit_size(program, program.symbols[decoder.sequence], 1)
        program.facts.add(
            KVCache(
                capacity="", layers=0, tree=self.tree, tokens=str(decoder.tokens.meta["input"]), positions=positions,
                limit=limit, logits=logits_of(program),
            )
        )  # fmt: skip
        block_export(program, NO_FOLDER, by=self.name)

    def _caches(
        self, program: Program, number: int, k: fx.Node, v: fx.Node, batch: Any, capacity: Any
    ) -> list[fx.Node]:
        """Add the caches of an attention: one for both where its values are its keys."""
        caches = []
        for name, node in (("key", k), ("value", v))[: 1 if k is v else 2]:
            value = node.meta["val"]
            heads = value.shape[1]
            if ranks_of(program):
                placed = placements(program)[node]
                if isinstance(placed, Shard):
                    heads = placed.total
            caches.append(
                add_input(
                    program, f"{name}_cache_{number}", [batch, heads, capacity, value.shape[-1]], value.dtype
                )
            )
        return caches

    def _bias(
        self,
        program: Program,
        tables: AtCapacity,
        bias: fx.Node,
        positions: fx.Node,
        slots: fx.Node,
        first: fx.Node,
    ) -> fx.Node:
        """Return the bias on the scores of new tokens for every slot."""
        if bias in tables.decoder.moving:
            raise NotCausal(bias, "what is added to its scores depends on the tokens")
        with program.edit.before(first):
            table = tables.value(bias)
            if not isinstance(table, fx.Node):
                raise NotCausal(bias, "what is added to its scores is no tensor")
            if not surely_equal(table.meta["val"].shape[-2], 1):
                table = rows_of_positions(program, table, table.meta["val"].dim() - 2, positions)
            if self.tree:
                call = program.edit.call
                keys = call(composites.cache_positions.default, positions, slots, tables.capacity)
                heads, rows = (call(aten.sym_size.int, table, dim) for dim in (1, 2))
                index = call(aten.unsqueeze.default, call(aten.unsqueeze.default, keys, 1), 1)
                index = call(aten.expand.default, index, [-1, heads, rows, -1])
                batch = call(aten.sym_size.int, positions, 0)
                table = call(
                    aten.gather.default, call(aten.expand.default, table, [batch, -1, -1, -1]), 3, index
                )
        return table

    def _token_wise(
        self, program: Program, decoder: Decoder, tables: AtCapacity, value: fx.Node, users: list[fx.Node],
        positions: fx.Node, first: fx.Node,
    ) -> None:  # fmt: skip
        """Replace a value per token index by its value at the tokens' positions."""
        dims = decoder.has_length(value)
        if len(dims) != 1:
            raise NotCausal(users[0], "it mixes tokens, and was not recognised as attention")
        with program.edit.before(first):
            table = tables.value(value)
            rows = rows_of_positions(program, table, dims[0], positions)
            gap = value.meta["val"].dim() - rows.meta["val"].dim()
            if gap > 0:
                raise NotCausal(value, "its token dimension cannot be preceded by a batch dimension")
        for user in users:
            user.replace_input_with(value, _under(program, rows, user))
        program.changed()

    def check(self, before: Program, after: Program, entry: PassReport) -> None:
        """Compare a run in chunks with the whole program; see :class:`~graphopt.passes.framework.contracts.ExactInChunks`.

        The rewritten program is run unless it is too large; then a small version of the original gets a cache too.
        """
        small = reduced(before)
        if small is None:
            entry.notes.append(
                "not compared in chunks: even one layer of each kind is too large for this machine"
            )
            return
        if small is not before:
            after = self.copied(small)
            self._insert(after)
        worst = compare_with_cache(small, after, seed=1)
        entry.checks, entry.error = 1, 0.0 if worst is None else worst.error
        if worst is not None and not worst.error <= ExactInChunks.limit:
            raise ContractError(
                f"{self.name}: output {worst.name} in chunks differs from that of the whole program by {worst.error:.2g}"
            )


def takes_trees(program: Program) -> bool:
    """Return whether a cache of this program can have trees: not where tokens pick keys by what they compute for pairs."""
    try:
        return not pairs_of(Decoder(program), program.graph.nodes)
    except NotCausal:
        return True  # the pass says what else is in the way


def _with_latents(program: Program, decoder: Decoder, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Let attentions attend to latents where that makes caches smaller, and return the pairs of keys and values then."""
    after = []
    for pair in pairs:
        readers = [
            node
            for node in program.graph.nodes
            if is_operator(node, "graphopt.attention")
            and (arguments(node)["k"].name, arguments(node)["v"].name) == pair
        ]
        latents = [latent_of(program, node) for node in readers]
        if not all(latents):
            after.append(pair)
            continue
        keys: fx.Node | None = None
        for node, latent in zip(readers, latents, strict=True):
            assert latent is not None
            keys = attend_to_latents(program, decoder, node, latent, keys)
        assert keys is not None
        after.append((keys.name, keys.name))
    return after


def _too_long(limit: int, length: int) -> str:
    return f"the model has positions for {limit} tokens, {length} are more"


def _sites(decoder: Decoder) -> list[Site]:
    """Return the sites: one for each pair of keys and values, however many attentions read it."""
    program = decoder.program
    sites: dict[tuple[str, str], Site] = {}
    for node in program.graph.nodes:
        if not is_operator(node, "graphopt.attention"):
            continue
        args = arguments(node)
        k, v = args["k"], args["v"]
        if node not in decoder.moving:
            continue  # of an encoder
        if k not in decoder.moving and v not in decoder.moving and not decoder.has_length(k):
            _require_steady(decoder, node)
            continue
        if decoder.has_length(k) == [1] == decoder.has_length(args["q"]):
            continue  # among values of one token, such as those that earlier layers left of it
        # what a bias of pairs hides shows in the comparison
        if (
            not args["causal"]
            and not decoder.hides_later(args["bias"])
            and args["bias"] not in decoder.moving
        ):
            raise NotCausal(node, "an attention sees later tokens")
        if decoder.has_length(k) != [2] or k not in decoder.moving:
            raise NotCausal(node, "the keys of an attention are not computed from the row of tokens")
        if args["segments"] is not None:
            raise NotCausal(node, "an attention separates segments of a row")
        if args["key_mask"] is not None and not decoder.sees_everything(args["key_mask"]):
            raise NotCausal(node, "an attention masks keys for another reason than padding")
        heads, size = k.meta["val"].shape[1], k.meta["val"].shape[-1]
        if not isinstance(heads, int) or not isinstance(size, int):
            raise NotCausal(node, f"its keys have {heads} heads of {size} values, and caches have one size")
        sites.setdefault((k.name, v.name), Site(node.name, key=k.name, value=v.name, heads=heads, size=size))
    states = [Site(s.node.name, state=s.kind, shape=list(s.shape)) for s in states_needed(decoder)]
    if not sites and not states:
        raise NotCausal(decoder.tokens, "no attention and no state was recognised")
    return [*sites.values(), *states]


def _require_steady(decoder: Decoder, node: fx.Node) -> None:
    """Raise an error if an attention to an encoder depends on which tokens are new."""
    args = arguments(node)
    if args["causal"] or args["window"] is not None or args["segments"] is not None:
        raise NotCausal(node, "an attention to other values than those of the tokens depends on positions")
    for name in ("bias", "key_mask"):
        if isinstance(args[name], fx.Node) and args[name] in decoder.moving:
            raise NotCausal(node, f"the {name.replace('_', ' ')} of an attention depends on the tokens")


def _read_from_encoder(program: Program, decoder: Decoder) -> None:
    """Make outputs of the keys and values that tokens do not change, so that they can be computed once."""
    _, beside = tokens_of(program)
    if not beside:
        return
    outputs: dict[str, str] = {}
    held: set[fx.Node] = set()
    pairs = 0
    for node in list(program.graph.nodes):
        if not is_operator(node, "graphopt.attention") or node not in decoder.moving:
            continue
        k, v = (arguments(node)[name] for name in "kv")
        if k in decoder.moving or v in decoder.moving:
            continue
        for name, value in (("key", k), ("value", v)):
            if value not in held:
                held.add(value)
                outputs[f"cross_{name}_{pairs}"] = name
                program.add_output(f"cross_{name}_{pairs}", value)
        pairs += 1
    nodes = program.input_nodes
    still = [
        n
        for n in program.signature.inputs
        if nodes[n] not in decoder.moving and nodes[n] not in decoder.masks
    ]
    inputs = [
        n for n in still if nodes[n] not in (*decoder.positions, *decoder.zeros) and n not in program.dials
    ]
    program.facts.add(CrossCache(tuple(inputs), tuple(outputs)))


def _under(program: Program, rows: fx.Node, user: fx.Node) -> fx.Node:
    """Return (batch, ...) as a user reads it whose other operand has more dimensions, batch first: (batch, 1, ..., ...)."""
    if not (has(user, Trait.POINTWISE) or is_operator(user, "graphopt.rotary")):
        return rows
    with program.edit.before(user):
        for _ in range(user.meta["val"].dim() - rows.meta["val"].dim()):
            rows = program.edit.call(aten.unsqueeze.default, rows, 1)
    return rows


def _positions(program: Program, decoder: Decoder) -> fx.Node:
    """Return the input of positions, which is required from now on."""
    if not decoder.positions:
        batch, tokens = decoder.tokens.meta["val"].shape[:2]
        return add_input(program, "position_ids", [batch, tokens], torch.int64)
    node = decoder.positions[0]
    name = str(node.meta["input"])
    spec = replace(program.signature.inputs[name], fill=None, filled_positions_only=False)
    program.signature = replace(program.signature, inputs={**program.signature.inputs, name: spec})
    return node


def _stored(program: Program, cache: fx.Node, values: fx.Node, slots: fx.Node, output: str) -> fx.Node:
    group = ""
    placed: Placement = WHOLE
    if ranks_of(program):
        placed = placements(program)[values]
        group = next(str(arguments(n)["group"]) for n in program.graph.nodes if has(n, ON_RANKS))
    with program.edit.after(values):
        if isinstance(placed, Shard):
            cache = program.edit.call(
                composites.local_slice.default, cache, 1, list(placed.starts), placed.length, group
            )
        stored = program.edit.call(composites.cache_store.default, cache, values, slots)
        gathered = stored
        if isinstance(placed, Shard):
            if not placed.even:
                raise NotCausal(values, "ranks share key-value heads, which a cache would store twice")
            gathered = program.edit.call(composites.all_gather.default, stored, 1, ranks_of(program), group)
    program.add_output(output, gathered)
    return stored


def _drop_masks(program: Program, decoder: Decoder, keep: list[fx.Node]) -> None:
    """Remove the padding masks from the inputs; their sizes are replaced by those of the tokens."""
    for node in [*decoder.masks, *decoder.zeros, *(p for p in decoder.positions if p not in keep)]:
        for user in list(node.users):
            if size_of_input(user):
                with program.edit.before(user):
                    size = program.edit.call(aten.sym_size.int, decoder.tokens, user.args[1])
                user.replace_all_uses_with(size)
                program.graph.erase_node(user)
        program.edit.erase_dead(list(node.users))
        if not node.users:
            remove_input(program, str(node.meta["input"]))
    program.changed()
