"""Guards of an export on sizes: read as constraints, and expressed as ranges if possible."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from ..ir.compat import guard_code, size_guards
from ..ir.constraints import Relation, constraints_among, constraints_with, format_relations, parse_relation
from ..ir.errors import CheckpointError
from ..ir.inputs import unite_sizes
from ..ir.program import Program
from ..ir.signature import Signature, SizeRange

DENSE = 4200  # every size up to here is checked, beyond it only those near powers of two
POINTS = torch.tensor(
    sorted({*range(1, DENSE + 1), *(2**k + d for k in range(12, 21) for d in (-1, 0, 1, 2))}),
    dtype=torch.float64,
)
_WALK = 256
_SAMPLE = 6000


def read_guards(program: Program, exported: ExportedProgram) -> None:
    """Restrict a lifted program to the sizes for which its export is valid.

    A guard that the grammar of constraints cannot express narrows ranges instead.
    """
    guards = size_guards(program.mode)
    texts: list[str] = []
    for guard in guards:
        # a size that no input has, such as that of the base of a view, cannot be checked at a call
        if not guard.free_symbols or not guard.free_symbols <= set(program.symbols):
            continue
        try:
            texts += format_relations(guard, program.symbols)
        except CheckpointError:
            _narrow(program, guard)
    code = guard_code(exported)
    if len(code) > len(guards):
        texts += _from_code(program, code)
    program.signature.constraints = tuple(dict.fromkeys(texts))
    _open_ranges(program.signature)
    drop_idle(program.signature)


def _open_ranges(signature: Signature) -> None:
    """Remove from ranges what constraints imply, so that it can be tested too."""
    sizes = {n: SizeRange(1, None, limits.hint) for n, limits in signature.sizes.items()}
    constrained = replace(signature, sizes=sizes)
    simplify(constrained)
    for name, limits in list(signature.sizes.items()):
        implied = constrained.sizes[name]
        low = 1 if limits.low <= implied.low else limits.low
        open_ = limits.high is not None and implied.high is not None and implied.high <= limits.high
        if limits.low != limits.high:
            signature.sizes[name] = replace(limits, low=low, high=None if open_ else limits.high)


def _from_code(program: Program, code: Iterable[str]) -> list[str]:
    """Read the guards of a file, which torch stores as Python code; they are parsed as relations of sizes, never run."""
    names = frozenset(program.signature.sizes)
    shapes = {name: spec.shape for name, spec in program.signature.inputs.items()}

    def size(match: re.Match[str]) -> str:
        shape, dim = shapes.get(match[1], ()), int(match[2])
        return f"({shape[dim]})" if dim < len(shape) else "?"

    texts = []
    for guard in code:
        text = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", size, guard)
        try:
            if parse_relation(text, names).names:
                texts.append(text)
        except CheckpointError:
            for name in names:
                if re.search(rf"\b{name}\b", text):
                    _fix(program.signature, name)
    return texts


def _narrow(program: Program, guard: Any) -> None:
    """Restrict a size to where a guard that only sympy can evaluate holds; a guard on several sizes fixes them all."""
    symbols = sorted(guard.free_symbols, key=str)
    names = [program.symbols[s] for s in symbols]
    if len(symbols) > 1:
        for name in names:
            _fix(program.signature, name)
        return
    limits = program.signature.sizes[names[0]]

    def holds(size: int) -> bool:
        try:
            return bool(guard.subs(symbols[0], size) == sympy.true)
        except (TypeError, ValueError, ZeroDivisionError):
            return False

    low = high = limits.hint
    while low > 2 and limits.hint - low < _WALK and holds(low - 1):
        low -= 1
    while high - limits.hint < _WALK and holds(high + 1):
        high += 1
    unlimited = high - limits.hint >= _WALK and all(holds(2**k) for k in range(high.bit_length(), 17))
    _limit(program.signature, names[0], 1 if low <= 2 else low, None if unlimited else high)


def _fix(signature: Signature, name: str) -> None:
    hint = signature.sizes[name].hint
    signature.sizes[name] = SizeRange(hint, hint, hint)


def _limit(signature: Signature, name: str, low: int, high: int | None) -> None:
    limits = signature.sizes[name]
    highs = [h for h in (limits.high, high) if h is not None]
    signature.sizes[name] = replace(limits, low=max(limits.low, low), high=min(highs, default=None))


def relations_of(signature: Signature) -> list[Relation]:
    """Return the constraints as relations."""
    names = frozenset(signature.sizes)
    return [parse_relation(text, names) for text in signature.constraints]


def holding(signature: Signature, relation: Relation, name: str, points: torch.Tensor) -> torch.Tensor:
    """Return for which values of one size a relation holds, with the others as they were at capture."""
    sizes: dict[str, Any] = {n: limits.hint for n, limits in signature.sizes.items()}
    holds = relation.holds({**sizes, name: points})
    return torch.as_tensor(holds).expand(points.shape)


def within(limits: SizeRange, points: torch.Tensor = POINTS) -> torch.Tensor:
    """Return the points that are in a range."""
    inside = points >= max(limits.low, 1)
    return points[inside if limits.high is None else inside & (points <= limits.high)]


def drop_idle(signature: Signature) -> None:
    """Drop constraints that hold for all sizes of at least two; sizes of one are tested separately."""
    signature.constraints = tuple(r.text for r in relations_of(signature) if not _always(signature, r))


def _drop_implied(signature: Signature) -> None:
    """Drop constraints that the others imply, after unnecessary ones were dropped."""
    for relation in sorted(relations_of(signature), key=lambda r: -len(r.text)):
        others = [r for r in relations_of(signature) if r.text != relation.text]
        if len(relation.names) > 1 and _implied(signature, relation, others):
            signature.constraints = tuple(r.text for r in others)


def _always(signature: Signature, relation: Relation) -> bool:
    if len(relation.names) == 1:
        points = within(signature.sizes[next(iter(relation.names))])
        points = points[points >= 2]
        return bool(len(points)) and bool(
            holding(signature, relation, next(iter(relation.names)), points).all()
        )
    return _implied(signature, relation, [])


def _implied(signature: Signature, relation: Relation, others: list[Relation]) -> bool:
    """Return whether a relation of several sizes holds on all samples that satisfy the others."""
    generator = torch.Generator().manual_seed(0)
    samples = {}
    for name, limits in signature.sizes.items():
        points = within(limits)
        points = points[points >= 2] if len(points) > 1 else points
        # small sizes occur in all combinations, large ones by chance
        points = torch.cat([points[:24], points[24:100:8], points[100::97], points[-3:]])
        samples[name] = points[torch.randint(0, len(points), (_SAMPLE,), generator=generator)]
    valid = torch.ones(_SAMPLE, dtype=torch.bool)
    for other in others:
        valid = valid & torch.as_tensor(other.holds(samples))
    holds = torch.as_tensor(relation.holds(samples)).expand(_SAMPLE)
    return int(valid.sum()) >= 20 and bool(holds[valid].all())


def simplify(signature: Signature) -> None:
    """Express constraints on single sizes as equivalent ranges and remainders."""
    for _ in range(2):
        fixed = {n: limits.hint for n, limits in signature.sizes.items() if limits.low == limits.high}
        names = frozenset(signature.sizes)
        signature.constraints = constraints_with(signature.constraints, names, fixed)
        for name in signature.sizes:
            _simplify(signature, name)
        _express_equality(signature)
        drop_idle(signature)
        _drop_implied(signature)


def settle_by_guards(program: Program) -> None:
    """Simplify the guards of an export if there is no model to test them against."""
    simplify(program.signature)
    for text in program.signature.constraints:
        second, _, first = text.partition(" == ")
        if {first, second} <= set(program.signature.sizes):
            unite_sizes(program, first, second)
    simplify(program.signature)


def take_limits(signature: Signature, other: Signature, tried: set[str]) -> None:
    """Give a program the limits of a smaller one of the same architecture, which were tested against a model.

    Args:
        signature: changed in place; constraints that the smaller program did not have remain.
        other: signature of the smaller program, with settled limits.
        tried: the smaller program's constraints before they were settled.
    """
    untried = [text for text in signature.constraints if text not in tried]
    names = frozenset(signature.sizes)
    settled = constraints_among(other.constraints, frozenset(other.sizes), signature.sizes)
    signature.constraints = (*untried, *settled)
    for name in names & set(other.sizes):
        _limit(signature, name, other.sizes[name].low, other.sizes[name].high)
    simplify(signature)


def _express_equality(signature: Signature) -> None:
    """Replace constraints that make two sizes equal by that equality."""
    relations = relations_of(signature)
    for pair in {r.names for r in relations if len(r.names) == 2}:
        first, second = sorted(pair, key=list(signature.sizes).index)
        if signature.sizes[first].hint != signature.sizes[second].hint:
            continue
        grid = torch.arange(2, 40, dtype=torch.float64)
        first_values, second_values = torch.meshgrid(grid, grid, indexing="ij")
        together = torch.ones(first_values.shape, dtype=torch.bool)
        sizes: dict[str, Any] = {n: limits.hint for n, limits in signature.sizes.items()}
        between_both = [r for r in relations if pair <= r.names]
        for relation in between_both:
            together = together & relation.holds({**sizes, first: first_values, second: second_values})
        if bool((together == (first_values == second_values)).all()):
            others = tuple(r.text for r in relations if r not in between_both or len(r.names) > 2)
            signature.constraints = (*others, f"{second} == {first}")
            relations = relations_of(signature)


def _simplify(signature: Signature, name: str) -> None:
    relations = relations_of(signature)
    single = [r for r in relations if r.names == {name}]
    unresolved = []
    for relation in single:
        interval = _interval(signature, relation, name)
        if interval is None:
            unresolved.append(relation)
        else:
            _limit(signature, name, *interval)
    texts = _without_repeats(signature, name, unresolved)
    signature.constraints = (*(r.text for r in relations if r.names != {name}), *texts)


def _interval(signature: Signature, relation: Relation, name: str) -> tuple[int, int | None] | None:
    """Return the range in which a relation holds, if it is a single one that contains the captured size, else None."""
    hint = signature.sizes[name].hint
    holds = holding(signature, relation, name, POINTS)
    indices = holds.nonzero().flatten()
    if not len(indices) or len(indices) != int(indices[-1] - indices[0]) + 1:
        return None
    low, high = int(POINTS[indices[0]]), int(POINTS[indices[-1]])
    if not low <= hint <= high:
        return None
    if int(indices[-1]) == len(POINTS) - 1:
        return low, None
    beyond = int(POINTS[indices[-1] + 1])
    while beyond - high > 1:
        middle = (beyond + high) // 2
        if bool(holding(signature, relation, name, torch.tensor([float(middle)])).all()):
            high = middle
        else:
            beyond = middle
    return low, high


def _without_repeats(signature: Signature, name: str, relations: list[Relation]) -> list[str]:
    """Return constraints equivalent to the relations of one size within its range: a remainder if that suffices."""
    points = within(signature.sizes[name], POINTS[:DENSE])
    shortest: dict[bytes, str] = {}
    for relation in relations:
        holds = holding(signature, relation, name, points)
        if not bool(holds.all()):
            key = holds.contiguous().numpy().tobytes()
            if len(relation.text) < len(shortest.get(key, relation.text + " ")):
                shortest[key] = relation.text
    together = torch.ones(len(points), dtype=torch.bool)
    for relation in relations:
        together = together & holding(signature, relation, name, points)
    allowed = points[together]
    if len(allowed) > 1:
        step = int(allowed[1] - allowed[0])
        remainder = int(allowed[0]) % step
        if step > 1 and bool(((points % step == remainder) == together).all()):
            return [f"{name} % {step} == {remainder}"]
    elif len(allowed) == 1 and signature.sizes[name].high is not None:
        _fix(signature, name)
        return []
    return list(shortest.values())
