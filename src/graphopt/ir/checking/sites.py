"""Exactness checks of a rewrite, site by site: each replaced value is compared with its replacement in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import CheckpointError, VerificationError
from ..running.fold import depends_on_weights_alone
from ..running.region import Region, cut, drawn_source, leaf_value
from ..running.roundings import new_roundings
from ..schema import argument, is_operator, operator_name
from ..weights import numel
from .comparison import relative_error

if TYPE_CHECKING:
    from ..program import Program

LIMIT = 1e-11
"""Largest relative error of an exact rewrite in float64: far above rounding errors, far below one changed row."""

_REAL_BYTES = 1 << 28


@dataclass(frozen=True)
class SiteCheck:
    """The comparison of one site: its values, the largest relative error, and the kind of weights.

    ``through`` names other changed values between the site and the leaves of both regions.
    """

    old: str
    new: str
    error: float
    weights: str
    source: str = ""
    reason: str = ""
    through: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Tell whether the rewrite is exact at this site."""
        return self.error <= LIMIT


@dataclass
class _Pair:
    old: fx.Node
    new: fx.Node
    before: Region
    after: Region


def changed_values(before: Program, after: Program, may_lose: bool = False) -> list[tuple[fx.Node, fx.Node]]:
    """Return pairs (old value, new value) whose equality makes both programs equal.

    They are the values that the pass replaced, the operators whose arguments it changed in place, the
    readers of weights it changed, and the outputs that it replaced. Outputs may be missing only with ``may_lose``.
    """
    old_nodes = {node.name: node for node in before.graph.nodes}
    replaced: dict[str, fx.Node] = {}
    for name, node in after.edit.journal:
        replaced[name] = node
    final = {name: _alive(node, replaced) for name, node in replaced.items()}
    pairs = [(old_nodes[n], new) for n, new in final.items() if n in old_nodes and new is not None]
    seen = {old.name for old, _ in pairs}
    sources = {n: w.source for n, w in before.weights.items()}
    for node in after.graph.nodes:
        old = old_nodes.get(node.name)
        if old is None or node.op != "call_function" or node.name in seen:
            continue
        touched_weight = any(
            n.name in sources
            and n.name in after.weights
            and after.weights[n.name].source is not sources[n.name]
            for n in node.all_input_nodes
        )
        if touched_weight or not _same_call(old, node, final):
            pairs.append((old, node))
    results = after.outputs
    for name, old_value in before.outputs.items():
        if name not in results:
            if may_lose:
                continue
            raise VerificationError(f"the program no longer returns {name}", node=old_value.name)
        new_value = results[name]
        if new_value.name != old_value.name and new_value is not final.get(old_value.name):
            pairs.append((old_value, new_value))
    return pairs


def _alive(node: fx.Node, replaced: dict[str, fx.Node]) -> fx.Node | None:
    for _ in range(100):
        if not node._erased:
            return node
        following = replaced.get(node.name)
        if following is None or following is node:
            return None
        node = following
    return None


def _same_call(old: fx.Node, new: fx.Node, final: dict[str, fx.Node | None]) -> bool:
    if old.target is not new.target:
        return False
    first: list[Any] = []
    second: list[Any] = []
    fx.map_arg((old.args, old.kwargs), first.append)
    fx.map_arg((new.args, new.kwargs), second.append)
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.name != b.name and final.get(a.name) is not b:
            return False
    plain_old = fx.map_arg((old.args, old.kwargs), lambda n: "node")
    plain_new = fx.map_arg((new.args, new.kwargs), lambda n: "node")
    return repr(plain_old) == repr(plain_new)


def check_sites(before: Program, after: Program) -> list[SiteCheck]:
    """Compare every changed value of a rewrite with the value before, each computed from the same inputs.

    Sites of the same signature (operators, wiring, shapes) are checked once, on random weights at two sizes;
    one site of each signature is also checked on its real weights, where they can be read.

    Args:
        before: the program before the pass.
        after: the program after it, with the edit log of the pass.
    """
    pairs = changed_values(before, after)
    shared_names = {n.name for n in before.graph.nodes} & {n.name for n in after.graph.nodes}
    changed = {new.name for _, new in pairs} | {old.name for old, _ in pairs}

    def stop(node: fx.Node) -> bool:
        return node.name in shared_names and node.name not in changed

    checks: list[SiteCheck] = []
    seen: dict[Any, SiteCheck] = {}
    for old, new in pairs:
        pair = _cut_alike(before, after, old, new, stop)
        # weights with new values are checked at every site
        brought = tuple(n.name for n in pair.after.weights if _new_or_changed(before, after, n.name))
        key = (pair.before.key(before), pair.after.key(after), _sharing(pair), brought)
        if key not in seen:
            seen[key] = _check(before, after, pair, bool(brought))
        through = tuple(n.name for n in pair.before.operators if n.name in changed and n is not old)
        labels = {"old": old.name, "new": new.name, "source": before.source_line(old), "through": through}
        checks.append(replace(seen[key], **labels))  # type: ignore[arg-type]
    return checks


def _cut_alike(
    before: Program, after: Program, old: fx.Node, new: fx.Node, stop: Callable[[fx.Node], bool]
) -> _Pair:
    """Cut both regions so that no leaf of one is a value that the other computes from its own leaves."""
    through: set[str] = set()
    constant = depends_on_weights_alone(before)

    def ends(node: fx.Node) -> bool:
        return stop(node) and node.name not in through

    while True:
        pair = _Pair(old, new, cut(before, [old], ends), cut(after, [new], ends))
        first, second = ({n.name: n for n in r.leaves} for r in (pair.before, pair.after))
        weights = [{n.name for n in r.weights} for r in (pair.before, pair.after)]
        given_names = first.keys() | second.keys() | weights[0] | weights[1]
        further = {
            name
            for name in first.keys() ^ second.keys()
            if _descends(first.get(name) or second[name], given_names - {name})
        }
        # a leaf of both regions that depends on weights alone, where one region reads such a weight itself
        further |= {
            name
            for name in first.keys() & second.keys()
            if first[name] in constant and _descends(first[name], weights[0] ^ weights[1])
        }
        if not further:
            return pair
        through |= further


def _descends(node: fx.Node, names: set[str], limit: int = 400) -> bool:
    """Tell whether a value is computed from one of those named."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False  # a size has the same value everywhere
    work = list(node.all_input_nodes)
    seen: set[fx.Node] = set()
    while work and len(seen) < limit:
        current = work.pop(0)
        if current.name in names:
            return True
        if current not in seen:
            seen.add(current)
            work.extend(current.all_input_nodes)
    return False


def _new_or_changed(before: Program, after: Program, name: str) -> bool:
    """Tell whether a pass added a weight or gave it other values."""
    return name not in before.weights or after.weights[name].source is not before.weights[name].source


def _check(before: Program, after: Program, pair: _Pair, brought: bool) -> SiteCheck:
    error, weights, reason = 0.0, "real" if brought else "random", ""
    added = new_roundings(pair.before, pair.after)
    if added:
        # float64, in which both are compared, would not show it
        narrow = ", ".join(sorted(str(dtype) for dtype in added))
        return SiteCheck(
            "", "", float("inf"), weights, reason=f"it rounds to {narrow}, which it did not before"
        )
    try:
        if not brought:
            error = _compare(before, after, pair)
        real = _real(before, after, pair, always=brought)
        if brought and real is None:
            # the new values cannot be read, and an unchecked rewrite does not count as exact
            reason = "it is computed from weights without values"
            return SiteCheck("", "", float("inf"), weights, reason=reason)
        if real is not None and not real <= error:
            error, weights = real, "real" if brought else "real and random"
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        error = float("inf")
        reason = (
            f"it cannot be computed: {str(problem).strip().splitlines()[0] if str(problem) else problem!r}"
        )
    return SiteCheck("", "", error, weights, reason=reason)


def _sharing(pair: _Pair) -> tuple[int, ...]:
    """Return, for each leaf and weight of the new region, its index in the old one, or -1."""
    names = {n.name: i for i, n in enumerate([*pair.before.leaves, *pair.before.weights])}
    return tuple(names.get(n.name, -1) for n in [*pair.after.leaves, *pair.after.weights])


def _leaf_input(before: Program, after: Program, node: fx.Node, sizes: dict[str, int], seed: int) -> Any:
    """Return a random value for a leaf of a region; run-time settings have their defaults."""
    dial = after.dials.get(str(node.meta.get("input", ""))) if node.op == "placeholder" else None
    if dial is not None:
        return torch.tensor(dial.default, dtype=torch.float64)
    drawn = leaf_value(before, node, sizes, seed)
    name = str(node.meta.get("input", ""))
    spec = after.signature.inputs.get(name) if node.op == "placeholder" else None
    new = spec is not None and name not in before.signature.inputs
    if new and spec.fill is not None and spec.fill.rule == "marks":  # type: ignore[union-attr]
        return torch.zeros_like(drawn)  # the program before has no mask tokens
    return drawn


def _compare(before: Program, after: Program, pair: _Pair) -> float:
    """Return the largest relative error on random weights."""
    worst = 0.0
    for seed, sizes in enumerate(_sizes(before, pair)):
        values = {}
        for index, node in enumerate({n.name: n for n in [*pair.before.leaves, *pair.after.leaves]}.values()):
            values[node.name] = _leaf_input(before, after, node, sizes, 17 * index + seed)
        seeds = {n.name: i for i, n in enumerate([*pair.before.weights, *pair.after.weights])}

        def load(node: fx.Node, seeds: dict[str, int] = seeds, offset: int = seed) -> torch.Tensor:
            if before.weights[node.name].kind != "parameter" and numel(node.meta["val"].shape) <= 4:
                return before.weights[node.name].source.load()
            return _varied(node, drawn_source(node, 1009 * offset + seeds[node.name]).load())

        worst = max(worst, _error(pair, values, load))
        if worst > LIMIT:
            break
    return worst


def _varied(node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    """Return random values for a weight, made positive where its readers show that it is a variance."""
    for user in node.users:
        if operator_name(user.target) == "aten.batch_norm" and len(user.args) > 4 and user.args[4] is node:
            return tensor.abs() + 1e-3
        if operator_name(user.target) == "graphopt.norm_scale" and user.args[0] is node:
            return tensor.abs() + 1e-3
        vector = operator_name(user.target) in ("aten.add", "aten.sqrt", "aten.rsqrt") and tensor.dim() == 1
        if vector and any(_takes_root(u) for u in (user, *user.users)):
            return tensor.abs() + 1e-3
        if operator_name(user.target) == "aten.to":
            return _varied(user, tensor)
    return tensor


def _takes_root(node: fx.Node) -> bool:
    name = operator_name(node.target)
    if name == "aten.pow":
        power = node.args[1] if len(node.args) > 1 else None
        return not isinstance(power, (int, float)) or power != int(power) or power < 0
    return name in ("aten.rsqrt", "aten.sqrt")


def _real(before: Program, after: Program, pair: _Pair, *, always: bool) -> float | None:
    """Return the largest relative error on the real weights, or None if they cannot be read or are too large."""
    weights = {n.name: n for n in [*pair.before.weights, *pair.after.weights]}
    if (
        not always
        and sum(numel([int(s) for s in n.meta["val"].shape]) * 8 for n in weights.values()) > _REAL_BYTES
    ):
        return None
    nodes = {n.name: n for n in [*pair.before.leaves, *pair.after.leaves]}

    def load(node: fx.Node) -> torch.Tensor:
        weight = (after if node in pair.after.weights else before).weights[node.name]
        return weight.source.load()

    worst = 0.0
    try:
        for sizes in _sizes(before, pair)[: 2 if always else 1]:
            values = {n.name: _leaf_input(before, after, n, sizes, i) for i, n in enumerate(nodes.values())}
            worst = max(worst, _error(pair, values, load))
    except CheckpointError:
        return None
    return worst


def _sizes(program: Program, pair: _Pair) -> list[dict[str, int]]:
    """Return two choices of sizes within the program's limits; one where no size varies.

    Where attention windows changed, the longer sequence exceeds them.
    """
    limits = program.signature.sizes
    if not limits:
        return [{}]

    def within(name: str, size: int) -> int:
        high = limits[name].high
        return max(limits[name].low, min(size, high if high is not None else size))

    windows = [{argument(n, "window") for n in r.operators if is_operator(n, "graphopt.attention")} - {None}
               for r in (pair.before, pair.after)]  # fmt: skip
    length = max([5, *(w + 2 for w in windows[0] ^ windows[1])])
    # the tracer numbers sizes that occur twice
    kinds = {name: name.split("_")[0] for name in limits}
    first = {
        name: within(name, {"batch": 2, "sequence": length}[kind])
        if kind in ("batch", "sequence")
        else limits[name].hint
        for name, kind in kinds.items()
    }
    second = {
        name: within(name, {"batch": 1, "sequence": 3}[kind])
        if kind in ("batch", "sequence")
        else first[name]
        for name, kind in kinds.items()
    }
    nearest = program.signature.nearest
    return [nearest(first), nearest(second)]


def _error(pair: _Pair, values: dict[str, Any], load: Callable[[fx.Node], torch.Tensor]) -> float:
    """Return the relative error of the new value against the old one."""
    expected, actual = pair.before.run(values, load), pair.after.run(values, load)
    # a value that differs between ranks has one entry per rank
    if len(expected) != len(actual):
        (expected, actual) = (
            (expected * len(actual), actual) if len(expected) == 1 else (expected, actual * len(expected))
        )
    return relative_error(actual, expected)
