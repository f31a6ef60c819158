"""A dial that stands still: the program with that input held there, for every kind of dial."""

from __future__ import annotations

import torch
from amounts import examples
from builders import Shape, tokens
from drawn_decoders import SIZES, Decoder, decoders
from drawn_mixtures import Drawn, mixtures, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from preferring_routers import with_preferences

import graphopt

DECODERS = decoders(
    (Shape(layers=3, width=8), Shape(norm="layer", gated=False, bias=True, spelling="conv1d"))
)
DIALLED = {
    "split-ffn{widths=[1/4 1/2 1] score=none}": DECODERS,
    "split-ffn{widths=[1/2 1] skip=true score=none}": DECODERS,
    "skip-layers{layers=[0] phase=decode}": DECODERS,
    "dial-top-k": mixtures(),
    "dial-top-k{per_layer=true}": mixtures(),
}


@settings(max_examples=examples(24), deadline=None)
@given(st.sampled_from(sorted(DIALLED)), st.booleans(), st.data())
def test_frozen_is_held(text: str, default: bool, data: st.DataObject) -> None:
    """Bit for bit; wrong if it stood elsewhere, another dial stood still, or it could still be turned."""
    drawn: Decoder | Drawn = data.draw(DIALLED[text])
    draw = rows if isinstance(drawn, Drawn) else tokens
    whole = with_preferences(graphopt.optimize(drawn.program, text, verify="off"), drawn.seed)
    name = data.draw(st.sampled_from(sorted(whole.dials)))
    dial = whole.dials[name]
    value = dial.default
    if not default:
        numbers = (
            st.floats(dial.low, dial.high) if "split" in text else st.integers(int(dial.low), int(dial.high))
        )
        value = float(data.draw(numbers))
    given_value = "" if default else f" value={value!r}"
    done = graphopt.optimize(whole, f"freeze-dial{{dial={name}{given_value}}}", verify="off")
    others = {n: d.low for n, d in whole.dials.items() if n != name}
    assert set(done.dials) == set(others)
    assert name not in done.signature.inputs
    for size in SIZES:
        given_ = draw(*size, seed=drawn.seed)
        expected = whole(**given_, **others, **{name: value})["logits"]
        assert torch.equal(done(**given_, **others)["logits"], expected)
