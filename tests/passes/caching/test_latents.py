"""Caches of latents: the same text from smaller caches, whatever the layout, and keys and values wherever it is not exact."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from amounts import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import LoweringError
from graphopt.decoding.bounded import BoundedDecoder
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.policies import as_policy
from graphopt.ir.facts import KVCache
from graphopt.ir.program import Program

VOCABULARY, WIDTH, LONGEST, NEW = 30, 24, 64, 10


@dataclass(frozen=True)
class Shape:
    """How latent attention is laid out.

    Attributes:
        latent: size of the latent.
        heads: number of heads.
        key: projected entries of a key.
        shared: entries of a key that all heads share; 0 for none.
        value: entries of a value.
        shared_first: they come before the projected ones.
        by_head: rows of the matrix are sorted by head, keys and values of each together; else all keys come first.
        twist: what lies between the matrix and the keys: nothing, a factor, a bias or a rotation.
    """

    latent: int = 8
    heads: int = 3
    key: int = 6
    shared: int = 4
    value: int = 5
    shared_first: bool = False
    by_head: bool = True
    twist: str = ""


class Latent(nn.Module):
    """A decoder of one layer with latent attention."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.shape = s = shape
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.q = nn.Linear(WIDTH, s.heads * (s.key + s.shared), bias=False)
        self.down, self.small = nn.Linear(WIDTH, s.latent + s.shared, bias=False), nn.LayerNorm(s.latent)
        self.up = nn.Linear(s.latent, s.heads * (s.key + s.value), bias=s.twist == "bias")
        self.o, self.head = nn.Linear(s.heads * s.value, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        s, (batch, n) = self.shape, input_ids.shape
        x = self.embed(input_ids) + self.places(torch.arange(n))
        h = self.norm(x)
        q = self.q(h).view(batch, n, s.heads, -1).transpose(1, 2)
        latent, shared = self.down(h).split([s.latent, s.shared], -1)
        up = self.up(self.small(latent))
        if s.by_head:
            k, v = up.view(batch, n, s.heads, -1).transpose(1, 2).split([s.key, s.value], -1)
        else:
            k, v = (
                t.view(batch, n, s.heads, -1).transpose(1, 2)
                for t in up.split([s.heads * s.key, s.heads * s.value], -1)
            )
        if s.twist == "factor":
            k = k * 1.5
        elif s.twist == "rotation":
            angle = torch.arange(n)[:, None] * 0.3
            k = torch.cat(
                [
                    k[..., :3] * angle.cos() - k[..., 3:] * angle.sin(),
                    k[..., 3:] * angle.cos() + k[..., :3] * angle.sin(),
                ],
                -1,
            )
        if s.shared:
            parts = [k, torch.tanh(shared).unsqueeze(1).expand(-1, s.heads, -1, -1)]
            k = torch.cat(parts[::-1] if s.shared_first else parts, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.head(x + self.o(mixed.transpose(1, 2).flatten(2))) * 4}


def captured(shape: Shape, seed: int = 0) -> tuple[Latent, Program]:
    model = Latent(shape, seed).double().eval()
    return model, graphopt.capture(model, {"input_ids": torch.randint(0, VOCABULARY, (2, 7))})


def caches(program: Program) -> dict[str, int]:
    """Return the size of a token of each cache."""
    inputs = program.signature.inputs
    return {n: int(s.shape[1]) * int(s.shape[3]) for n, s in inputs.items() if "_cache_" in n}


def rows(seed: int, longest: int = 20) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(3)]


def continued(model: Latent, row: list[int]) -> list[int]:
    text = list(row)
    with torch.no_grad():
        for _ in range(NEW):
            text.append(int(model(torch.tensor([text]))["logits"][0, -1].argmax()))
    return text[len(row) :]


SHAPES = st.builds(
    Shape, latent=st.integers(3, 9), heads=st.integers(2, 5), key=st.integers(2, 6), value=st.integers(2, 6),
    shared=st.sampled_from([0, 3, 4]), shared_first=st.booleans(), by_head=st.booleans(),
)  # fmt: skip


@settings(max_examples=examples(12), phases=[Phase.generate])
@given(shape=SHAPES, seed=st.integers(0, 1 << 16))
def test_text_is_that_of_the_model(shape: Shape, seed: int) -> None:
    """Caches hold the latent and what heads share where that is smaller, and keys and values elsewhere."""
    model, program = captured(shape, seed)
    cached = with_cache(program)
    held = shape.latent + shape.shared
    if held < shape.heads * (shape.key + shape.shared + shape.value):
        assert caches(cached) == {"key_cache_0": held}
    else:
        assert sorted(caches(cached)) == ["key_cache_0", "value_cache_0"]
    texts = rows(seed)
    for strategy in (None, "token-recycling"):
        written = graphopt.generate(cached, texts, max_new_tokens=NEW, eos_token_id=None, strategy=strategy)
        for row, found in zip(texts, written[:, -NEW:].tolist(), strict=True):
            assert found == continued(model, row), strategy


@pytest.mark.parametrize("option", ["", "{tree=true}", "{max_length=32}", "{latents=false}"])
def test_exact_in_chunks(option: str) -> None:
    program = graphopt.optimize(captured(Shape())[1], f"insert-cache{option}")
    assert program.history[-1]["error"] <= 1e-12
    assert len(caches(program)) == (2 if "false" in option else 1)


@pytest.mark.parametrize("twist", ["factor", "bias", "rotation"])
def test_what_changes_keys_on_the_way_keeps_them(twist: str) -> None:
    """A latent that is multiplied into queries skips whatever lies between the matrix and the keys."""
    model, program = captured(Shape(twist=twist))
    cached = with_cache(program)
    assert sorted(caches(cached)) == ["key_cache_0", "value_cache_0"]
    texts = rows(1)
    written = graphopt.generate(cached, texts, max_new_tokens=NEW, eos_token_id=None)
    assert written[:, -NEW:].tolist() == [continued(model, row) for row in texts]


@pytest.mark.parametrize("policy", ["window", "heavy-hitters", "observed", "key-norm", "merge", "random"])
def test_policies_over_latents(policy: str) -> None:
    """Within the budget nothing is lost; beyond it, no more slots are held."""
    program = with_cache(captured(Shape())[1])
    options = " window=4" if policy == "observed" else ""
    texts = rows(2)
    whole = graphopt.generate(program, texts, max_new_tokens=NEW, eos_token_id=None)
    within = graphopt.generate(
        program, texts, max_new_tokens=NEW, eos_token_id=None, cache=f"{policy}{{budget=40 block=4{options}}}"
    )
    assert torch.equal(whole, within)
    decoder = BoundedDecoder(program, 1, LONGEST, as_policy(f"{policy}{{budget=12 block=4{options}}}"))  # type: ignore[arg-type]
    decoder.prefill([[t % VOCABULARY for t in range(50)]])
    assert decoder.filled[0] <= 12 + decoder.since[0] and decoder.peak <= 16


def test_bytes_are_those_of_latents() -> None:
    shape = Shape()
    _, program = captured(shape)
    sizes = [
        CachedDecoder(graphopt.optimize(program, f"insert-cache{option}"), 2, 20).bytes
        for option in ("", "{latents=false}")
    ]
    assert sizes[0] == 2 * 20 * 8 * (shape.latent + shape.shared)
    assert sizes[1] == 2 * 20 * 8 * shape.heads * (shape.key + shape.shared + shape.value)


def test_where_they_go(tmp_path: Path) -> None:
    """Saved and loaded, in few bits and as ONNX; genai, which wants keys and values, says how."""
    model, program = captured(Shape(latent=8, shared=8))
    cached = with_cache(program)
    cached.save(tmp_path / "program")
    again = graphopt.load(tmp_path / "program")
    texts = rows(3)
    expected = [continued(model, row) for row in texts]
    assert (
        graphopt.generate(again, texts, max_new_tokens=NEW, eos_token_id=None)[:, -NEW:].tolist() == expected
    )
    single = graphopt.capture(
        Latent(Shape(latent=8, shared=8)).eval(), {"input_ids": torch.randint(0, VOCABULARY, (2, 7))}
    )
    fixed = graphopt.optimize(single, "insert-cache{max_length=32}")
    fixed.lower("onnx", tmp_path / "step.onnx", sizes={"batch": 1, "sequence": 1})
    few = graphopt.optimize(fixed, "quantize-cache")
    assert few.facts[KVCache].layers == 1
    with pytest.raises(LoweringError, match="latents"):
        fixed.lower("genai", tmp_path / "genai")


def test_attentions_that_share_latents_share_a_cache() -> None:
    """Two attentions that read the same keys and values have one cache between them."""

    class Twice(Latent):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            s, (batch, n) = self.shape, input_ids.shape
            x = self.embed(input_ids) + self.places(torch.arange(n))
            h = self.norm(x)
            latent, _ = self.down(h).split([s.latent, s.shared], -1)
            k, v = (
                self.up(self.small(latent))
                .view(batch, n, s.heads, -1)
                .transpose(1, 2)
                .split([s.key, s.value], -1)
            )
            for _ in range(2):
                q = self.q(self.norm(x)).view(batch, n, s.heads, -1)[..., : s.key].transpose(1, 2)
                x = x + self.o(
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
                )
            return {"logits": self.head(x) * 4}

    model = Twice(Shape(), 3).double().eval()
    cached = with_cache(graphopt.capture(model, {"input_ids": torch.randint(0, VOCABULARY, (2, 7))}))
    assert caches(cached) == {"key_cache_0": 8}
    texts = rows(4)
    written = graphopt.generate(cached, texts, max_new_tokens=NEW, eos_token_id=None)
    assert written[:, -NEW:].tolist() == [continued(model, row) for row in texts]
