"""Keys and values read by several layers: as the model that was built so, with fits taken in exactly, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import examples
from builders import Shape, Transformer, rotate, tokens
from drawn_decoders import SHAPES, SIZES, Decoder, alike, decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.ir.errors import PassRefusedError, PipelineError
from graphopt.ir.program import Program
from graphopt.ir.running.fold import fold
from graphopt.ir.schema import arguments
from graphopt.passes import Context, Plan
from graphopt.passes.caching.fitting import Moments
from graphopt.passes.caching.likeness import Likeness
from graphopt.passes.caching.share_caches import ShareCaches
from graphopt.passes.framework.kept_tensors import kept

LAYERED = (
    *(Shape(**{**vars(shape), "layers": 4}) for shape in SHAPES),
    Shape(layers=5, qkv="grouped", bias=True),
)


class Reading(nn.Module):
    """Attention that reads maps of what an earlier one stored, or stores its own."""

    def __init__(self, mix: nn.Module, store: dict[int, Any], number: int, leader: int, maps: dict[str, Any]):
        super().__init__()
        self.mix, self.store, self.number, self.leader, self.maps = mix, store, number, leader, maps

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        s, (b, n, _) = self.mix.shape, x.shape
        q, k, v = self.mix.parts(x)
        q, k = (rotate(t) if s.rotary else t for t in (q, k))
        if self.leader == self.number:
            self.store[self.number] = k, v
        else:
            k, v = self.store[self.leader]
            maps = (self.maps.get(f"attention.{self.number}.{what}") for what in ("keys", "values"))
            k, v = (
                t if by is None else torch.einsum("hij,bhnj->bhni", by, t)
                for by, t in zip(maps, (k, v), strict=True)
            )
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.mT / s.head_size**0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e30) if mask is not None else scores
        return self.mix.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, n, -1))


def built(model: Transformer, leaders: list[int], maps: dict[str, Any]) -> nn.Module:
    store: dict[int, Any] = {}
    for number, (block, leader) in enumerate(zip(model.blocks, leaders, strict=True)):
        block.mix = Reading(block.mix, store, number, leader, maps)
    return model


def leaders_of(count: int, options: dict[str, int]) -> list[int]:
    if "start" in options:
        return [min(i, options["start"] - 1) for i in range(count)]
    return [i - i % options["groups"] for i in range(count)]


GROUPINGS = st.one_of(
    st.integers(2, 4).map(lambda n: {"groups": n}), st.integers(1, 3).map(lambda n: {"start": n})
)


@given(decoders(LAYERED), GROUPINGS, st.booleans(), st.integers(0, 99))
@settings(max_examples=examples(12), deadline=None)
def test_any_decoder_is_the_one_built_so(
    decoder: Decoder, grouping: dict[str, int], fit: bool, seed: int
) -> None:
    """Wrong if another layer were read, a fit were taken in at another place or entry, or a bias forgotten."""
    data = [tokens(*SIZES[1], seed=seed + i) for i in range(2)] if fit else None
    step, program = ShareCaches(**grouping), decoder.program
    plan = step.plan(program, Context(data))
    assert not plan.refused
    leaders = leaders_of(decoder.shape.layers, grouping)
    followers = {f"attention.{i}": f"attention.{j}" for i, j in enumerate(leaders) if i != j}
    assert {site.block: site["leader"] for site in plan.sites} == followers
    maps = kept(plan.sites[0]["maps"]) if fit else {}
    assert len(maps) == (2 * len(followers) if fit else 0)
    shared = graphopt.optimize(program, [step], data=data)
    model = built(decoder.model, leaders, maps)
    for size in SIZES:
        inputs = tokens(*size, seed=seed)
        real = inputs["attention_mask"].bool()
        assert alike(shared(**inputs)["logits"][real], model(**inputs)["logits"][real])
    s = decoder.shape
    gone = len(followers) * 2 * s.kv_heads * s.head_size * (s.size + s.bias)
    assert _stored(shared) == _stored(program) - gone, "something of theirs is still stored"


def _stored(program: Program) -> int:
    return sum(torch.Size(w.source.shape).numel() for w in fold(program).weights.values())


@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 1 << 20))
@settings(max_examples=examples(20), deadline=None)
def test_fits_find_what_is_there(heads: int, pairs: int, seed: int) -> None:
    """Wrong if a fit mixed heads, or a rotation were fitted the wrong way round."""
    generator = torch.Generator().manual_seed(seed)
    size, layout = 2 * pairs + 1, [(i, i + pairs) for i in range(pairs)]
    other = torch.randn(heads, 40, size, generator=generator, dtype=torch.float64)
    turning = torch.zeros(heads, size, size, dtype=torch.float64)
    for i, j in layout:
        real, imaginary = torch.randn(2, heads, generator=generator, dtype=torch.float64)
        turning[:, i, i] = turning[:, j, j] = real
        turning[:, j, i], turning[:, i, j] = imaginary, -imaginary
    turning[:, -1, -1] = 3.0
    free = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    for wanted, layout_of in ((turning, layout), (free, None)):
        value = other @ wanted.mT
        moments = Moments(value.mT @ other, other.mT @ other, value.square().sum())
        found = moments.fit(1e-12) if layout_of is None else moments.fit_turning(layout_of, 1e-12)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
        assert moments.missed(found) < 1e-9
        off = found + 0.1 * free
        missed = (value - other @ off.mT).square().sum() / value.square().sum()
        assert moments.missed(off) == pytest.approx(float(missed), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("options", ["groups=2", "start=1"])
def test_there_is_one_cache_for_each_group(
    name: str, options: str, captured: Callable[[str], Program]
) -> None:
    """Bytes of the caches, and text written with them as computed whole each time."""
    program, _ = varied(name, captured(name))
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    shared = graphopt.optimize(program, f"share-caches{{{options}}}", data=data)
    layers = len(program.anatomy.attention)
    groups = (layers + 1) // 2 if "groups" in options else 1

    def per_slot(made: Program) -> int:
        caches = [s for n, s in made.signature.inputs.items() if "_cache_" in n]
        return sum(s.shape[1] * s.shape[3] * s.dtype.itemsize for s in caches)

    whole, cached = (graphopt.optimize(p, "insert-cache") for p in (program, shared))
    assert per_slot(cached) * layers == per_slot(whole) * groups
    note = f"keys and values: {layers} -> {groups} pairs, {per_slot(whole):,} -> {per_slot(cached):,} bytes"
    assert any(n.startswith(note) for n in shared.report.passes[0].notes)
    row = list(ROWS[0])
    for _ in range(6):
        row.append(int(shared(input_ids=torch.tensor([row]))["logits"][0, -1].argmax()))
    assert generated(shared, ROWS[:1], 6)[0].tolist() == row[len(ROWS[0]) :]


def test_it_is_saved_and_leaves_as_onnx_but_not_as_a_folder(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    shared = graphopt.optimize(captured("llama"), "share-caches", data=data)
    again = graphopt.load(shared.save(tmp_path / "saved"))
    assert torch.equal(again(**data[0])["logits"], shared(**data[0])["logits"])
    names = {name for w in again.weights.values() for name in w.all_names}
    assert not any("layers.1.self_attn.k_proj" in n or "layers.1.self_attn.v_proj" in n for n in names)
    assert max(shared.lower("onnx", tmp_path / "model.onnx").errors.values()) < 1e-4
    with pytest.raises(graphopt.LoweringError, match="layers read the keys and values of others"):
        shared.save_pretrained(tmp_path / "hf")


class Different(nn.Module):
    """Two layers that need not have one shape."""

    def __init__(self, first: Shape, second: Shape):
        super().__init__()
        self.model = Transformer(first)
        self.model.blocks.append(Transformer(second).blocks[0])

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model(input_ids)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (Shape(kv_heads=4), "it has 4 key-value heads, attention.0 has 2"),
        (Shape(heads=8, kv_heads=2, head_size=2), "its keys have 2 entries, those of attention.0 have 4"),
        (Shape(rotary=False), "positions reach its keys in another way than those of attention.0"),
        (Shape(causal=False), "one of it and attention.0 sees later tokens"),
    ],
)
def test_layers_of_another_kind_are_refused(second: Shape, reason: str) -> None:
    ids = {"input_ids": tokens(2, 6)["input_ids"]}
    program = graphopt.capture(Different(Shape(layers=1), second), ids)
    plan = ShareCaches().plan(program, Context())
    assert not plan.sites
    assert [r.block for r in plan.refused] == ["attention.1"]
    assert reason in plan.refused[0].reason


def test_local_and_global_layers_are_not_mixed(captured: Callable[[str], Program]) -> None:
    """Gemma 2: the global layer would read keys that a local one is trained to need for its window alone."""
    plan = ShareCaches().plan(captured("gemma2"), Context())
    assert not plan.sites
    assert (
        "it sees all tokens, while attention.0, whose keys it would read, has a window of"
        in plan.refused[0].reason
    )


def test_tables_of_rotation_are_compared_by_what_they_hold() -> None:
    """Another base shows in the table; a table that is computed a second time is the same."""
    program = Decoder(Shape(), 0, 1.0).program.copy()
    cores = [b.parts["core"] for b in program.anatomy.attention]
    turned = arguments(cores[1])["k"]
    cosines = arguments(turned)["cos"]
    with program.edit.before(turned):
        again = program.edit.call(cosines.target, *cosines.args, **cosines.kwargs)
        program.edit.change(turned, cos=again)
        assert Likeness(program).difference(*cores, "it.0") == ""
        program.edit.change(turned, cos=program.edit.call(torch.ops.aten.mul.Tensor, again, 0.5))
    assert Likeness(program).difference(*cores, "it.0").startswith("its keys are rotated by other angles")


@pytest.mark.parametrize(
    ("which", "changed", "reason"),
    [
        (0, {"window": 3}, "it sees all tokens, while it.0, whose keys it would read, has a window of 3"),
        (1, {"window": 3}, ""),
        (1, {"softcap": 5.0}, ""),
        (1, {"key_mask": None}, "it hides other keys than it.0 (key_mask)"),
        (1, {"sinks": "sinks"}, "one of it and it.0 has sinks, the other has none"),
        (1, {"bias": "bias"}, "its scores get another bias than those of it.0"),
        (1, {"causal": False}, "one of it and it.0 sees later tokens, the other does not"),
    ],
)
def test_what_may_differ_and_what_may_not(which: int, changed: dict[str, Any], reason: str) -> None:
    """A follower keeps its own scores, window and cap, but cannot see what its leader's keys are not made for."""
    program = Decoder(Shape(), 0, 1.0).program.copy()
    cores = [b.parts["core"] for b in program.anatomy.attention]
    added = {
        "sinks": torch.zeros(4, dtype=torch.float64),
        "bias": torch.zeros(1, 1, 1, 1, dtype=torch.float64),
    }
    values = {n: program.edit.add_weight(f"new.{n}", added[n]) if n == v else v for n, v in changed.items()}
    program.edit.change(cores[which], **values)
    assert Likeness(program).difference(cores[0], cores[1], "it.0") == reason


def test_a_norm_of_queries_leaves_keys_as_they_are(captured: Callable[[str], Program]) -> None:
    """Qwen 3: a map of keys cannot pass the norm of queries; values are fitted all the same, and the report says so."""
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    shared = graphopt.optimize(captured("qwen3"), "share-caches", data=data)
    entry = shared.report.passes[0]
    assert any("keys are read as they are" in n and "rms_norm lies between" in n for n in entry.notes)
    plan = ShareCaches().plan(captured("qwen3"), Context(data))
    assert list(plan.scores) == ["attention.1.values"]


def test_plans_that_cannot_be_followed_are_refused() -> None:
    program = Decoder(LAYERED[0], 0, 1.0).program
    step = ShareCaches()
    plan = step.plan(program, Context())
    plan.sites[1].choices["leader"] = "attention.0"
    with pytest.raises(PassRefusedError, match=r"attention.3 read attention.0, but .* it reads attention.2"):
        step.rewrite(program.copy(), plan)
    with pytest.raises(PipelineError, match="there is no attention 4; they are numbered 0 to 3"):
        ShareCaches(start=4).plan(program, Context())
    with pytest.raises(PipelineError, match="groups=3 has no effect"):
        graphopt.optimize(program, "share-caches{start=2 groups=3}")
    fitted = step.plan(program, Context([tokens(2, 6)]))
    other = Decoder(LAYERED[1], 0, 1.0).program
    sites = [s for s in fitted.sites if s.block in {"attention.1", "attention.3"}]
    with pytest.raises(PipelineError, match="it is another model's"):
        step.rewrite(other.copy(), Plan(sites=sites))


def test_keys_that_are_shared_already_stay_so() -> None:
    shared = graphopt.optimize(Decoder(LAYERED[0], 0, 1.0).program, "share-caches{start=3}")
    plan = ShareCaches().plan(shared, Context())
    assert [s.block for s in plan.sites] == ["attention.1"]
    assert [(r.block, r.reason) for r in plan.refused] == [
        ("attention.3", "its keys are an earlier block's already")
    ]
