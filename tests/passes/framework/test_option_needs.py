"""Options that others leave without effect are refused, for every option of every pass and recipe that declares it."""

from __future__ import annotations

import itertools
import re
import typing
from functools import lru_cache
from typing import Any

import pytest
import torch
from builders import Shape, Transformer, tokens

import graphopt
from graphopt import PipelineError
from graphopt.ir.needs import alternatives, matters
from graphopt.ir.option import check, default_of, help_of, options_of
from graphopt.passes.framework.registry import BUILT_IN, find_pass
from graphopt.training.recipes import METHODS, find_method

OWNERS: dict[str, type] = {name: find_pass(name) for name in BUILT_IN} | dict(METHODS)
DECLARED = [
    (owner, name)
    for owner, cls in OWNERS.items()
    for name, field in options_of(cls).items()
    if field.metadata["needs"]
]
TRIED: tuple[Any, ...] = (
    False, True, 0, 1, 2, 3, 0.0, 0.25, 0.5, 1.0, [], [0], [1], [1, 2], [1.0], [0.5, 1.0], "", "word", "pcie",
)  # fmt: skip


@lru_cache
def values_of(cls: type, name: str) -> list[Any]:
    """Values that an option takes, its default first."""
    field, annotation = options_of(cls)[name], typing.get_type_hints(cls)[name]
    found = [default_of(field)]
    for value in [*(field.metadata["choices"] or ()), *TRIED]:
        try:
            value = check("", name, field, annotation, value)
        except PipelineError:
            continue
        if not any(value == other and type(value) is type(other) for other in found):
            found.append(value)
    return found


@lru_cache
def settings_around(owner: str, name: str) -> list[dict[str, Any]]:
    """Options of the others, in every combination of what the option's needs speak of, that are right without it."""
    cls = OWNERS[owner]
    spoken = sorted({o for each in alternatives(options_of(cls)[name].metadata["needs"]) for o in each})
    bases = [
        {},
        {k: v for k, v in getattr(cls, "trial", {}).items() if k != name},
        {"budget": 0.5},
        {"skip": True},
    ]
    found = []
    for base in bases:
        if not base.keys() <= options_of(cls).keys():
            continue
        for chosen in itertools.product(*(values_of(cls, o) for o in spoken)):
            options = base | dict(zip(spoken, chosen, strict=True))
            options = {k: v for k, v in options.items() if v != default_of(options_of(cls)[k])}
            try:
                cls(**options)
            except PipelineError as error:
                # two options may need one another
                if not re.search(rf": ({'|'.join(spoken)})=.* has no effect", error.message):
                    continue
            if options not in found:
                found.append(options)
    return found


@pytest.mark.parametrize(("owner", "name"), DECLARED)
def test_an_option_is_taken_where_it_matters_and_refused_where_it_does_not(owner: str, name: str) -> None:
    """Wrong if a declaration were never met, never broken, or broken without a word."""
    cls = OWNERS[owner]
    fields = options_of(cls)
    sides = set()
    for options in settings_around(owner, name):
        values = {n: options.get(n, default_of(f)) for n, f in fields.items()}
        for value in values_of(cls, name)[1:]:
            effective = matters(fields[name].metadata["needs"], values | {name: value})
            try:
                cls(**options, **{name: value})
                said = ""
            except PipelineError as error:
                said = error.message
            refused = re.search(rf"{name}=.* has no effect beside (.*)", said)
            assert (refused is None) == effective, f"{options}, {name}={value}: {said}"
            if refused is not None:
                sides.add("refused")
                spoken = {o for each in alternatives(fields[name].metadata["needs"]) for o in each}
                assert any(f"{o}=" in refused.group(1) for o in spoken), said
            elif not said:
                sides.add("taken")
    assert sides == {"taken", "refused"}


@pytest.mark.parametrize(("owner", "name"), DECLARED)
def test_text_that_gives_the_default_is_refused_as_well(owner: str, name: str) -> None:
    """Wrong if only another value counted as given: what was written down was meant to do something."""
    cls = OWNERS[owner]
    make = find_method if owner in METHODS else lambda name, options: find_pass(name).from_options(options)
    default = default_of(options_of(cls)[name])
    for options in settings_around(owner, name):
        values = {n: options.get(n, default_of(f)) for n, f in options_of(cls).items()}
        if default is not None and not matters(options_of(cls)[name].metadata["needs"], values):
            with pytest.raises(PipelineError, match=f"{name}=.* has no effect"):
                make(owner, {**options, name: default})
            make(owner, options)
            return
    assert default is None


@pytest.mark.parametrize(("owner", "name"), DECLARED)
def test_the_catalogue_says_when_an_option_matters(owner: str, name: str) -> None:
    """Wrong if the help promised what the rule takes away."""
    assert "; only where " in help_of(options_of(OWNERS[owner])[name])


KNOWN = {
    "prune-ffn{fraction=0.5 strength=2.0}": ("strength", "allocation"),
    "skip-layers{layers=[1] score=kl}": ("score", "layers"),
    "skip-layers{speedup=2 search=greedy}": ("search", "speedup"),
    "quantize-communication{algorithm=gather link=pcie}": ("link", "algorithm"),
    "quantize-communication{outliers=none share=0.1}": ("share", "outliers"),
    "quantize-communication{group=32 outliers=none rate=0.1}": ("rate", "group"),
    "drop-sync-points{blocks=[0] sensitive=0.2}": ("sensitive", "blocks"),
    "split-ffn{router=linear router_size=8}": ("router_size", "router"),
    "expand-branches{kernels=[] identity=false align=last}": ("align", "kernels"),
}
KNOWN_RECIPES = {
    "phds{anchor_from=0.5}": ("anchor_from", "anchor"),
    "medusa{joint_weight=0.5}": ("joint_weight", "joint"),
    "dynamoe{train=routers language=0.5}": ("language", "train"),
    "draft{steps=1 decay=0.5}": ("decay", "steps"),
    "r2{strength=0 form=soft}": ("form", "strength"),
}


@pytest.mark.parametrize("text", [*KNOWN, *KNOWN_RECIPES])
def test_options_that_once_did_nothing(text: str) -> None:
    """Wrong if one of these ran, and did what it does without the option."""
    from graphopt.passes import parse_pipeline
    from graphopt.training.learning import as_method

    read: Any = parse_pipeline if text in KNOWN else as_method
    option, other = (KNOWN | KNOWN_RECIPES)[text]
    with pytest.raises(PipelineError, match=rf"{option}=\S+ has no effect beside .*{other}="):
        read(text)


@lru_cache
def plain() -> graphopt.Program:
    return graphopt.capture(Transformer(Shape(width=16)), tokens(2, 6))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=s) for s in range(count)]


def test_a_recipe_refuses_what_a_program_leaves_without_effect() -> None:
    """Wrong if tokens were to go around where there is no way around, or a dial was set that is not there."""
    split = graphopt.optimize(plain(), "split-ffn{score=none widths=[1/4 1]}", verify="off")
    with pytest.raises(PipelineError, match="skip has no effect: no token can skip"):
        find_method("duo-distil", {"skip": 0.5}).recipe(split)
    around = graphopt.optimize(plain(), "split-ffn{score=none widths=[1/4 1] skip=true}", verify="off")
    assert find_method("duo-distil", {"skip": 0.5}).recipe(around).form is not None
    with pytest.raises(PipelineError, match="dial has no effect: this program has no run-time setting"):
        find_method("language", {"dial": 1.0}).recipe(plain())
    one = graphopt.optimize(plain(), "attach-multi-token-heads{heads=1}", verify="off")
    with pytest.raises(PipelineError, match="decay has no effect: this program has one head"):
        find_method("medusa", {"decay": 0.5}).recipe(one)


@pytest.mark.parametrize("option", ["budget=0.5", "metric=kl"])
def test_what_says_how_a_loss_is_judged_needs_something_to_judge_on(option: str) -> None:
    """Wrong if a budget were given, nothing measured, and the program returned as if it were held."""
    program = plain()
    with pytest.raises(PipelineError, match=f"{option.partition('=')[0]} has no effect: there is no data"):
        graphopt.optimize(program, f"skip-layers{{layers=[0] {option}}}")
    done = graphopt.optimize(
        program, f"skip-layers{{layers=[0] {option.replace('0.5', '9')}}}", data=batches(2)
    )
    assert len(done.anatomy.layers) == 1
    with pytest.raises(PipelineError, match="metric has no effect: a metric of your own judges"):
        graphopt.optimize(
            program, "skip-layers{layers=[0] metric=kl}", data=batches(2), evaluate=lambda p: 1.0
        )


def test_thresholds_need_a_measurement() -> None:
    """Wrong if blocks were to be classed by losses that nobody measures."""
    program = graphopt.optimize(plain(), "shard-tensor-parallel{size=2}", verify="off")
    for options in ("fraction=1 sensitive=0.2", "fraction=0.5 insensitive=0.01"):
        with pytest.raises(PipelineError, match="has no effect: nothing is measured"):
            graphopt.optimize(program, f"drop-sync-points{{{options}}}")
    with pytest.raises(PipelineError, match="experts has no effect: this program has no block of the kind"):
        graphopt.optimize(plain(), "shard-tensor-parallel{size=2 experts=expert}")
