"""Mixtures of any routing: without some of their experts, and with fewer that take part."""

from __future__ import annotations

import torch
from amounts import examples
from drawn_decoders import SIZES, alike, recorded
from drawn_mixtures import Drawn, mixtures, rows
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt

SETTINGS = settings(max_examples=examples(24), deadline=None)


@SETTINGS
@given(mixtures(), st.sampled_from(["weight", "count", "random"]), st.data())
def test_experts_that_go_are_never_chosen(drawn: Drawn, score: str, data: st.DataObject) -> None:
    """Wrong if another expert went than the one that matters least, or routing weights stayed those of all."""
    program, model, routing = drawn.program, drawn.model, drawn.routing
    keep = data.draw(st.integers(routing.active, routing.experts))
    seen = [rows(2, 7, seed=drawn.seed + n) for n in range(2)]
    done = graphopt.optimize(
        program, f"prune-experts{{keep={keep} score={score}}}", data=[*seen, *seen], verify="off"
    )
    norms = {str(n): norm for n, norm in enumerate(model.norms)}
    runs = [recorded(norms, lambda batch=batch: model(**batch))[1] for batch in seen]
    for number, (mixture, site) in enumerate(
        zip(model.mixtures, done.history[-1]["plan"]["sites"], strict=True)
    ):
        left = site["left"]
        assert len(set(left)) == keep
        if score != "random":
            importance = torch.zeros(routing.experts, dtype=torch.float64)
            for run in runs:
                weights, chosen = mixture.route(run[str(number)].reshape(-1, run[str(number)].shape[-1]))
                given_ = weights.detach() if score == "weight" else torch.ones_like(weights)
                importance.index_add_(0, chosen.flatten(), given_.flatten())
            gone = [e for e in range(routing.experts) if e not in left]
            assert all(importance[e] <= importance[left].min() + 1e-9 for e in gone)
        mixture.there = torch.zeros(routing.experts, dtype=torch.bool)
        mixture.there[left] = True
    for size in SIZES:
        given_tokens = rows(*size, seed=drawn.seed + 9)
        with torch.no_grad():
            expected = model(**given_tokens)["logits"]
        assert alike(done(**given_tokens)["logits"], expected)


@SETTINGS
@given(mixtures(), st.sampled_from(["", "per_layer=true", "fixed"]), st.data())
def test_fewer_that_take_part(drawn: Drawn, how: str, data: st.DataObject) -> None:
    """Wrong if an expert beyond the dial took part, or the weights of those left were not those of a model with so many."""
    program, model, most = drawn.program, drawn.model, drawn.routing.active
    wanted = [data.draw(st.integers(1, most)) for _ in model.mixtures]
    if how != "per_layer=true":
        wanted = wanted[:1] * 2
    options = f"fixed={wanted[0]}" if how == "fixed" else how
    done = graphopt.optimize(program, f"dial-top-k{{{options}}}", verify="off")
    names = {"": ["active_experts"], "per_layer=true": ["active_experts_0", "active_experts_1"], "fixed": []}
    assert list(done.dials) == names[how]
    dials = dict(zip(done.dials, wanted, strict=False))
    for size in SIZES:
        given_ = rows(*size, seed=drawn.seed + 9)
        if how != "fixed":
            assert alike(done(**given_)["logits"], program(**given_)["logits"])
        for mixture, active in zip(model.mixtures, wanted, strict=True):
            mixture.active = active
        with torch.no_grad():
            expected = model(**given_)["logits"]
        assert alike(done(**given_, **dials)["logits"], expected)
