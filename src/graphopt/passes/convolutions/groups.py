"""Choosing the values of a graph that are best computed as one convolution of an earlier one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.infer import same_value
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import is_operator
from .borders import filled, read_border
from .forms import Form, add, follow, negative
from .reading import NotLinear, as_it_is, read_operator, spatial_axes

_MAX_SOURCES = 12  # sources tried for one value, so that the search stays linear in the graph


@dataclass
class Groups:
    """Chosen affine forms by output value, in graph order, and why other values have none."""

    forms: dict[fx.Node, Form] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)


@dataclass
class _Search:
    program: Program
    constant: set[fx.Node]
    allow_growth: bool
    forms: dict[fx.Node, list[Form]] = field(default_factory=dict)
    operator_cost: dict[fx.Node, float] = field(default_factory=dict)
    best: dict[fx.Node, float] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def find_groups(program: Program, *, allow_growth: bool = False) -> Groups:
    """Return disjoint groups of operators, each of which one convolution replaces.

    Affine forms are built from the inputs on: every linear operator is a form of its input; compositions and sums
    of forms are forms where that is exact. Of all forms of a value the one with the fewest multiply-adds is chosen,
    including the computation of its source; among equals the one that replaces most operators.

    Args:
        program: a canonical program.
        allow_growth: prefer few operators to few multiply-adds.
    """
    search = _Search(program, depends_on_weights_alone(program), allow_growth)
    order = [n for n in program.graph.nodes if n.op == "call_function" and spatial_axes(n) > 0]
    for node in order:
        _find_forms(search, node)
    result = Groups()
    covered: set[fx.Node] = set()
    for node in reversed(order):
        if node in covered or node not in search.forms:
            continue
        form = _choose(search, node, covered)
        if form is not None:
            result.forms[node] = form
            covered |= form.nodes
    result.forms = {node: result.forms[node] for node in order if node in result.forms}
    inner = {n for form in result.forms.values() for n in form.nodes}
    result.reasons = {n: reason for n, reason in search.reasons.items() if n not in inner}
    return result


def _find_forms(search: _Search, node: fx.Node) -> None:
    try:
        form = read_operator(node, search.constant)
    except NotLinear as problem:
        search.reasons[node] = str(problem)
        return
    if form is not None:
        search.operator_cost[node] = _work(form) if form.size > 1 or form.convolutions else _numel(node)
        if has(node, Trait.PADDING) or is_operator(node, "aten.slice"):
            search.operator_cost[node] = 0.0
        forms = [form]
    elif is_operator(node, "aten.slice_scatter"):
        search.operator_cost[node] = 0.0
        forms = _border_forms(search, node)
    elif is_operator(node, "aten.add", "aten.sub") and len(node.args) == 2 and not node.kwargs:
        search.operator_cost[node] = 0.0
        forms = _sum_forms(search, node)
    else:
        return
    if forms:
        search.forms[node] = _compose(search, forms)
        search.best[node] = _cost(search, node, search.forms[node])


def _border_forms(search: _Search, node: fx.Node) -> list[Form]:
    """Return the affine forms of a filled border together with the operator whose value it surrounds."""
    border = read_border(node, search.constant)
    if border is None or any(user not in border[0].nodes for user in border[0].source.users):
        return []
    forms: list[Form] = []
    for before in search.forms.get(border[0].source, ()):
        following = filled(search.program, *border, before)
        if isinstance(following, str):
            search.reasons[node] = following
        else:
            forms.append(following)
    for inner in border[0].nodes - {node}:
        search.reasons.pop(inner, None)
    return forms


def _numel(node: fx.Node) -> float:
    total = 1.0
    for size in node.meta["val"].shape:
        total *= size.node.hint if isinstance(size, torch.SymInt) else size
    return total


def _work(form: Form) -> float:
    return _numel(form.value) * form.size


def _sum_forms(search: _Search, node: fx.Node) -> list[Form]:
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return []
    if (
        first in search.constant
        or second in search.constant
        or spatial_axes(first) < 0
        or spatial_axes(second) < 0
    ):
        return []
    if not same_value(first.meta["val"], second.meta["val"]):
        return []
    terms = [_terms(search, operand, node) for operand in (first, second)]
    if is_operator(node, "aten.sub"):
        terms[1] = [negative(term) for term in terms[1]]
    forms: list[Form] = []
    problem = ""
    for first_term in terms[0]:
        for second_term in terms[1]:
            if first_term.source is second_term.source and (first_term.nodes or second_term.nodes):
                form = add(node, first_term, second_term)
                if isinstance(form, str):
                    problem = form
                else:
                    forms.append(form)
    if problem and not forms:
        search.reasons[node] = problem
    elif not forms:
        _record_reason(search, node, (first, second))
    return forms


def _terms(search: _Search, operand: fx.Node, reader: fx.Node) -> list[Form]:
    """Return the affine forms of an operand: as it is, and over earlier values if nothing else reads it."""
    alone = all(user is reader for user in operand.users)
    return [as_it_is(operand), *(search.forms.get(operand, []) if alone else [])]


def _record_reason(search: _Search, node: fx.Node, operands: tuple[fx.Node, fx.Node]) -> None:
    """Record the reason for terms that would add up to a form if one of them were not read elsewhere."""
    candidates = [[as_it_is(o), *search.forms.get(o, [])] for o in operands]
    if any(a.source is b.source and (a.nodes or b.nodes) for a in candidates[0] for b in candidates[1]):
        for operand in operands:
            others = [u.name for u in operand.users if u is not node]
            if others and search.forms.get(operand):
                search.reasons[node] = f"its term {operand.name} is read by {others[0]} as well"


def _compose(search: _Search, forms: list[Form]) -> list[Form]:
    """Return the forms and their compositions with forms of their sources, where nothing else reads a source."""
    extended = list(forms)
    index = 0
    while index < len(extended) and len(extended) < _MAX_SOURCES:
        form = extended[index]
        index += 1
        source = form.source
        if not all(user in form.nodes for user in source.users):
            continue
        for before in search.forms.get(source, ()):
            if before.source is form.source or any(before.source is m.source for m in extended):
                continue
            following = follow(form, before)
            if isinstance(following, str):
                search.reasons.setdefault(form.value, following)
            else:
                extended.append(following)
    return extended


def _source_cost(search: _Search, form: Form) -> float:
    """Return the cost of computing a form's source, if only the form needs it.

    A value with several readers is not counted, whether its readers become one form or stay separate.
    """
    source = form.source
    if source in search.best and len(source.users) == 1 and all(user in form.nodes for user in source.users):
        return search.best[source]
    return 0.0


def _form_cost(search: _Search, form: Form) -> float:
    """Return the cost of a form, less that of values with several readers that the form makes superfluous."""
    inner = (n for n in form.nodes if n is not form.value and len(n.users) > 1)
    return _work(form) + _source_cost(search, form) - sum(search.best.get(n, 0.0) for n in inner)


def _unfused_cost(search: _Search, node: fx.Node) -> float:
    """Return the cost of leaving an operator as it is, with the best cost of inputs that only it reads."""
    inputs = {n for n in node.all_input_nodes if n in search.best and all(u is node for u in n.users)}
    return search.operator_cost[node] + sum(search.best[n] for n in inputs)


def _cost(search: _Search, node: fx.Node, forms: list[Form]) -> float:
    return min([_unfused_cost(search, node), *(_form_cost(search, f) for f in forms if f.convolutions)])


def _choose(search: _Search, node: fx.Node, covered: set[fx.Node]) -> Form | None:
    useful = [
        f for f in search.forms[node]
        if f.convolutions and len(f.nodes) > 1 and not f.nodes & covered and _replaces_something(f)
    ]  # fmt: skip
    if not useful:
        return None
    if search.allow_growth:
        return max(useful, key=lambda f: (len(f.nodes), -_work(f)))
    costs: list[tuple[float, int, Any]] = [(_form_cost(search, f), -len(f.nodes), f) for f in useful]
    cost, _, form = min(costs, key=lambda c: c[:2])
    plain = _unfused_cost(search, node)
    return form if cost <= plain + 1e-9 * abs(plain) else None


def _replaces_something(form: Form) -> bool:
    """Tell whether a form replaces more than a convolution and its padding, which are what it is written as."""
    return any(not has(n, Trait.PADDING) for n in form.nodes - {form.value}) or (form.branches > 1)


__all__ = ["Groups", "find_groups"]
