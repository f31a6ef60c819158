"""Pipelines, plans and sizes as text: read back to what was written, and wrong text is an error that says where."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import yaml
from amounts import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from graphopt import CheckpointError, PipelineError, Program
from graphopt.ir.facts import Canonical, Fact
from graphopt.ir.option import options_of
from graphopt.ir.sizes import format_size, parse_size
from graphopt.passes import Pass, Plan, Refused, Site, format_pipeline, option, parse_pipeline
from graphopt.passes.framework.manager import check_order
from graphopt.passes.framework.pipeline import as_passes
from graphopt.passes.framework.plan import read_plans, write_plans
from graphopt.passes.framework.registry import BUILT_IN, find_pass
from graphopt.passes.framework.values import format_value


@dataclass(frozen=True, kw_only=True)
class Everything(Pass):
    """A pass with an option of every kind."""

    name = "everything"

    word: str = option("plain", help="any text")
    words: list[str] = option([], help="any texts")  # noqa: RUF009
    number: float = option(0.5, help="any number")
    share: float | None = option(None, help="part of one", low=0, high=1)
    count: int | None = option(None, help="a count", low=0)
    flag: bool = option(True, help="yes or no")
    numbers: list[float] | None = option(None, help="numbers")  # noqa: RUF009
    nested: list[list[int]] = option([], help="lists of lists")  # noqa: RUF009
    kind: str = option("a", help="one of three", choices=("a", "b c", ""))


def _fact(
    label: str, *, requires: Any = (), provides: Any = (), excludes: Any = (), invalidates: Any = ()
) -> type[Pass]:
    body: dict[str, Any] = {
        "name": label, "__doc__": "Only facts.", "__annotations__": {}, "__module__": __name__,
        "requires": tuple(requires), "provides": tuple(provides),
        "excludes": tuple(excludes), "invalidates": tuple(invalidates),
    }  # fmt: skip
    return dataclass(frozen=True, kw_only=True)(type("Fact", (Pass,), body))


@dataclass(frozen=True)
class Halved(Fact, name="halved"):
    """Of this test's passes alone."""


Sharding = _fact("sharding", requires=[Canonical], provides=[Halved])
Dropping = _fact("dropping", requires=[Halved])
Freezing = _fact("freezing", requires=[Canonical], excludes=[Halved])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in ("Everything", "Sharding", "Dropping", "Freezing"):
        monkeypatch.setitem(BUILT_IN, globals()[cls].name, f"{__name__}:{cls}")


def values_for(annotation: Any, field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Return values of an option's type, within its limits."""
    low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
    if choices:
        return st.sampled_from(choices)
    found: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        str: st.text(),
    }
    if annotation in found:
        return found[annotation]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return st.lists(values_for(parts[0], field), max_size=4)
    return st.one_of(*(values_for(part, field) for part in parts))


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    cls = find_pass(draw(st.sampled_from(sorted(BUILT_IN))))
    hints = typing.get_type_hints(cls)
    given = {
        name: draw(values_for(hints[name], field))
        for name, field in options_of(cls).items()
        if draw(st.booleans())
    }
    try:
        return cls(**given)
    except PipelineError:  # options that contradict one another
        assume(False)
        raise


# -- pipelines --------------------------------------------------------------------------------------------


@settings(max_examples=examples(400), deadline=None)
@given(steps=st.lists(passes(), min_size=1, max_size=4))
def test_a_pipeline_is_read_back_as_it_was_written(steps: list[Pass]) -> None:
    text = format_pipeline(steps)
    again = parse_pipeline(text)
    assert again == steps, f"{text!r} is read as other passes than wrote it"
    assert format_pipeline(again) == text
    assert as_passes([text, *steps]) == steps * 2


@pytest.mark.parametrize("text", ["[1 2 3]", "[1, 2, 3]", "[1,2,3]", "[1 , 2 3,]", "[1\n2,3]"])
def test_items_of_lists_stand_apart_by_spaces_or_commas(text: str) -> None:
    assert parse_pipeline(f"everything{{numbers={text} count=2}}, everything") == [
        Everything(numbers=[1.0, 2.0, 3.0], count=2), Everything(),
    ]  # fmt: skip


_PIECES = st.sampled_from(
    [
        "everything", "skip-layers", "fuse-projections", "{", "}", "[", "]", "=", ",", '"', "'", "\\", " ",
        "\n", "word", "number", "count", "numbers", "flag", "true", "none", "1", "-1", "1e5", "1e999", "1/3",
        "1/0", "9" * 400, "9" * 5000, "nan", "inf", ".", "-", "ä", "٣", "²", "\0", "remove", "layers",
        "layout", "grouped",
    ]
)  # fmt: skip


@settings(max_examples=examples(600), deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=14).map("".join)))
def test_any_text_is_a_pipeline_or_a_pipeline_error(text: str) -> None:
    try:
        steps = parse_pipeline(text)
    except PipelineError:
        return
    assert parse_pipeline(format_pipeline(steps)) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fuse-projection", "no pass 'fuse-projection'.*did you mean 'fuse-projections'"),
        ("fuze", "no pass 'fuze'(?s:.*)passes are .*fuse-projections"),
        ("fuse-projections{layuot=plain}", "no option 'layuot'.*did you mean 'layout'"),
        ("fuse-projections{layout=plane}", "'plane'; choose one of plain, grouped, interleaved"),
        ("fuse-projections{layout=5}", "layout must be a word, not 5"),
        ("fuse-projections{name=x}", "no option 'name'"),
        ("fuse-projections{contract=x}", "no option 'contract'"),
        ("skip-layers{remove=two}", "remove must be a whole number, not 'two'"),
        ("skip-layers{remove=1.5}", "remove must be a whole number, not 1.5"),
        ("skip-layers{remove=true}", "remove must be a whole number, not True"),
        ("skip-layers{remove=0}", "remove is 0, allowed is from 1 up"),
        ("skip-layers{budget=-0.1}", "allowed is from 0 up"),
        ("skip-layers{layers=3}", "layers must be a list of whole numbers"),
        ("skip-layers{layers=[a]}", "layers must be a list of whole numbers"),
        ("skip-layers{remove=1 layers=[1]}", "say the same thing twice"),
        ("skip-layers{remove=1 remove=2}", "remove is given twice at character 28"),
        ("skip-layers", "say what to remove(?s:.*)layers="),
        ("everything{share=2}", "allowed is from 0 to 1"),
        ("everything{number=nan}", "number must be a number, not 'nan'"),
        ("everything{number=1e999}", "too large a number"),
        ("everything{number=" + "9" * 400 + "}", "number must be a number"),
        ("everything{count=" + "9" * 5000 + "}", "too large a number"),
        ("everything{number=1/0}", "divides by zero"),
        ("everything{flag=1}", "flag must be true or false, not 1"),
        ("everything{nested=" + "[" * 50 + "]" * 50 + "}", "nested too deeply"),
        ("everything{word=", "expected a value, found 'the end'"),
        ("everything{word=a", "expected an option"),
        ('everything{word="a}', "quoted string is not closed"),
        ("everything{words=[a", "list is not closed"),
        ("everything{words=[a,,b]}", "expected a value, found ','"),
        ("everything{words=[,a]}", "expected a value, found ','"),
        ("everything{word a}", "expected '=', found 'a' at character 17"),
        ("everything everything", "expected ',', found 'e'"),
        ("everything,", "expected the name of a pass, found 'the end'"),
        ("", "names at least one pass"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_said(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", True, [1.0]])
def test_numbers_that_pass_every_limit_are_no_numbers(value: Any) -> None:
    """NaN compares false with any limit, so a budget of NaN would hold always."""
    with pytest.raises(PipelineError, match="must be a number"):
        Everything(share=value)
    with pytest.raises(PipelineError, match="must be a number"):
        Everything(number=value)


def test_passes_are_passes() -> None:
    for wrong in (5, [5], [None], ["fuse-projections", dict]):
        with pytest.raises(PipelineError, match="neither a pass nor its text"):
            as_passes(wrong)  # type: ignore[arg-type]


def test_an_order_that_cannot_work_is_refused_with_one_that_can(captured: Any) -> None:
    program: Program = captured("llama")
    freezing, sharding, dropping = Freezing(), Sharding(), Dropping()
    check_order(program, [freezing, sharding, dropping])
    with pytest.raises(PipelineError) as refused:
        check_order(program, [dropping, sharding, freezing])
    assert "dropping (pass 1) requires a program that is halved" in refused.value.message
    assert refused.value.hint == "this order works: freezing, sharding, dropping", (
        "the hint names no order that works"
    )
    check_order(program, parse_pipeline(refused.value.hint.partition(": ")[2]))
    with pytest.raises(PipelineError, match=r"freezing \(pass 2\) cannot run on a program that is halved"):
        check_order(program, [sharding, freezing])
    with pytest.raises(PipelineError, match="sharding before it makes the program halved"):
        check_order(program, [dropping])
    with pytest.raises(PipelineError) as refused:
        check_order(program, parse_pipeline("quantize"))
    assert refused.value.hint == "fit-target before it makes the program legal on a target"


# -- plans ------------------------------------------------------------------------------------------------

_PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False),
        st.text(max_size=12),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = st.text(min_size=1, max_size=10).filter(lambda name: name != "block")
_SITES = st.tuples(st.text(max_size=10), st.dictionaries(_NAMES, _PLAIN, max_size=3)).map(
    lambda p: Site(p[0], **p[1])
)
_PLANS = st.builds(
    Plan,
    sites=st.lists(_SITES, max_size=3),
    refused=st.lists(st.builds(Refused, st.text(max_size=10), st.text(max_size=30), st.text(max_size=20)), max_size=3),
    scores=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3),
    notes=st.lists(st.text(max_size=20), max_size=2),
)  # fmt: skip


@settings(max_examples=examples(200), deadline=None)
@given(plans=st.lists(st.tuples(st.text(max_size=20), _PLANS), max_size=3), note=st.text(max_size=20))
def test_a_plan_file_is_read_back_as_it_was_written(plans: list[tuple[str, Plan]], note: str) -> None:
    text = write_plans(plans, note)
    again = read_plans(text)
    assert again == plans, f"a plan is read as another than was written:\n{text}"
    assert write_plans(again, note) == text


_YAML = st.sampled_from(
    [
        "graphopt_plan: 1\n", "passes:\n", "- pass: a\n", "  sites:\n", "  - block: b\n", "    self: 1\n",
        "    1: 2\n", "  notes: 5\n", "  scores: {a: b}\n", "  refused: [x]\n", "passes: 5\n",
        "2001-99-99\n", "!!int ''\n", "!!float x\n", "!!timestamp x\n", "&a [*a]\n",
        "!!python/object/apply:os.system [x]\n", "[", "{", "- ", ": ", "\t", "\0", "9" * 5000, "!!bool x\n",
        "? [a]\n", "<<: 5\n", "é",
    ]
)  # fmt: skip


@settings(max_examples=examples(400), deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.lists(_YAML, max_size=8).map("".join)))
def test_any_text_is_a_plan_or_a_pipeline_error(text: str) -> None:
    try:
        plans = read_plans(text)
    except PipelineError:
        return
    assert yaml.safe_load(text)["graphopt_plan"] == 1
    assert [t for t, _ in plans] == [t for t, _ in read_plans(write_plans(plans))]


@pytest.mark.parametrize(
    "body",
    [
        "passes: 5",
        "passes: [5]",
        "passes: [{pass: 5}]",
        "passes: [{pass: a, sites: 5}]",
        "passes: [{pass: a, sites: {b: 1}}]",
        "passes: [{pass: a, sites: [{name: b}]}]",
        "passes: [{pass: a, sites: [{block: 5}]}]",
        "passes: [{pass: a, other: 1}]",
        "passes: [{pass: a, sites: [{block: b, 1: 2}]}]",
        "passes: [{pass: a, refused: [{block: b}]}]",
        "passes: [{pass: a, scores: {x: y}}]",
        "passes: [{pass: a, scores: 5}]",
        "passes: [{pass: a, notes: 5}]",
    ],
)
def test_a_plan_of_another_form_says_where(body: str) -> None:
    with pytest.raises(PipelineError, match=r"edited\.yaml"):
        read_plans(f"graphopt_plan: 1\n{body}\n", "edited.yaml")


# -- sizes ------------------------------------------------------------------------------------------------

BATCH, LENGTH = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "länge_2"))
SYMBOLS = {BATCH: "batch", LENGTH: "länge_2"}
_OPERATORS: dict[str, tuple[Any, Any]] = {
    "+": (lambda a, b: a + b, lambda a, b: a + b),
    "*": (lambda a, b: a * b, lambda a, b: a * b),
    "less": (lambda a, b: Max(a - b, sympy.Integer(0)), lambda a, b: max(a - b, 0)),
    "max": (Max, max),
    "min": (Min, min),
    "//": (FloorDiv, lambda a, b: a // b),
    "%": (Mod, lambda a, b: a % b),
}
_SIZES = st.recursive(
    st.one_of(st.sampled_from([BATCH, LENGTH]), st.integers(0, 300).map(sympy.Integer)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "*", "less", "max", "min"]), inner, inner),
        st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(1, 9).map(sympy.Integer)),
    ),
    max_leaves=6,
)


def made(tree: Any, leaf: Any, which: int) -> Any:
    if not isinstance(tree, tuple):
        return leaf(tree)
    return _OPERATORS[tree[0]][which](made(tree[1], leaf, which), made(tree[2], leaf, which))


@settings(max_examples=examples(200), deadline=None)
@given(tree=_SIZES, batch=st.integers(1, 50), length=st.integers(1, 50))
def test_a_size_is_read_back_as_it_was_written(tree: Any, batch: int, length: int) -> None:
    """The grammar is a part of Python's, which is the judge here."""
    text = str(format_size(made(tree, lambda leaf: leaf, 0), SYMBOLS))
    again = parse_size(text, {name: symbol for symbol, name in SYMBOLS.items()})
    names = {"batch": batch, "länge_2": length, "max": max, "min": min, "__builtins__": {}}
    at = {BATCH: batch, LENGTH: length}
    expected = made(tree, lambda leaf: at.get(leaf) or int(leaf), 1)
    assert eval(text, names) == expected, f"{tree} is written as {text}"
    assert eval(str(format_size(again, SYMBOLS)), names) == expected, f"{text} is read as {again}"


@settings(max_examples=examples(300), deadline=None)
@given(text=st.one_of(st.text(max_size=20), st.text("batch()+-*/%,max in_1923. ", max_size=60)))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text, {"batch": BATCH})
    except CheckpointError:
        return
    assert size.free_symbols <= {BATCH}
    assert parse_size(format_size(size, SYMBOLS), {"batch": BATCH}) == size


def test_values_of_options_are_written_so_that_fractions_stay_short() -> None:
    assert [format_value(v) for v in (1 / 16, 1 / 3, 0.1, 2.0, 1e300, True, None, "a b", "true", "1", [])] == [
        "0.0625", "1/3", "0.1", "2.0", "1e+300", "true", "none", '"a b"', '"true"', '"1"', "[]",
    ]  # fmt: skip
