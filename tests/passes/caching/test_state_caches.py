"""Programs with states: text token for token as transformers writes it, any pieces and any candidates, and refusals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import reference
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.decoding import Draft, Drafter, DraftProgram
from graphopt.decoding.cached import CachedDecoder
from graphopt.ir.errors import PassRefusedError
from graphopt.ir.facts import StateCache
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator
from graphopt.measure.context import Context
from graphopt.passes.caching.comparing import compare_with_cache
from graphopt.passes.caching.insert_cache import InsertCache
from graphopt.passes.framework.plan import Plan

NAMES = ["mamba2", "lfm2", "falcon_h1", "qwen3_next"]
COUNT = 24


@pytest.fixture(scope="module")
def texts(captured: Callable[[str], Program]) -> Callable[[str], tuple[Program, Program, Any]]:
    """Return a program, the same with caches for trees, and the text that transformers writes."""
    made: dict[str, tuple[Program, Program, Any]] = {}

    def of(name: str) -> tuple[Program, Program, Any]:
        if name not in made:
            program, model = varied(name, captured(name))
            tree = graphopt.optimize(program, "insert-cache{tree=true}")
            # one at a time: with padding beside them, the library's scans do not begin at zero
            expected = torch.cat([reference(model, [row], COUNT) for row in ROWS])
            assert max(len(set(row.tolist())) for row in expected) >= 4, "the text says nothing"
            made[name] = (program, tree, expected)
        return made[name]

    return of


class Guesses(Drafter):
    """Proposes random trees, on some paths of which is what the program will take."""

    name = "guesses"
    room = 7

    def __init__(self, seed: int, truth: list[list[int]]) -> None:
        self.draw, self.truth = random.Random(seed), truth

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        drafts = []
        for row in rows:
            whole = next((t for t in self.truth if t[: len(row)] == list(row)), list(row))
            tokens: list[int] = []
            parents: list[int] = []
            depths: list[int] = []
            for node in range(self.draw.randint(0, self.room)):
                parent = self.draw.randint(-1, node - 1)
                depth = 1 if parent < 0 else depths[parent] + 1
                place = len(row) + depth - 1
                right = whole[place] if place < len(whole) else 3
                tokens.append(right if self.draw.random() < 0.7 else self.draw.randrange(3, 100))
                parents.append(parent)
                depths.append(depth)
            drafts.append(Draft(tokens, parents))
        return drafts


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_transformers(name: str, texts: Any, tmp_path: Any) -> None:
    """Three ragged rows, token by token, with candidates, and after the program was saved and loaded."""
    program, tree, expected = texts(name)
    plain = graphopt.optimize(program, "insert-cache")
    assert torch.equal(generated(plain, ROWS, COUNT), expected)
    again = graphopt.load(tree.save(tmp_path / "saved"))
    assert again.facts[StateCache] == tree.facts[StateCache]
    truth = [[*row, *text] for row, text in zip(ROWS, expected.tolist(), strict=True)]
    for seed in range(2):
        assert torch.equal(generated(again, ROWS, COUNT, strategy=Guesses(seed, truth)), expected)
    assert torch.equal(generated(tree, ROWS, COUNT, strategy="prompt-lookup"), expected)


def test_a_draft_with_states(texts: Any) -> None:
    """A draft whose states are taken back after tokens that were refused; the program itself is always right."""
    program, tree, expected = texts("mamba2")
    _, other, _ = texts("lfm2")
    for draft in (program, other):
        assert torch.equal(generated(tree, ROWS, COUNT, strategy=DraftProgram(draft, 3)), expected)
    found = graphopt.stream(
        tree, ROWS, max_new_tokens=COUNT, strategy=DraftProgram(program, 3), eos_token_id=None
    )
    for _ in found:
        pass
    assert found.statistics.acceptance == [1.0, 1.0, 1.0], "a program drafts for itself and is not believed"


@pytest.mark.parametrize(("name", "layer"), [("lfm2", 1), ("falcon_h1", 0)])
def test_a_draft_of_its_own_first_layers(name: str, layer: int, texts: Any) -> None:
    program, _, expected = texts(name)
    attached = graphopt.optimize(program, f"attach-early-exit{{layers=[{layer}]}}")
    assert torch.equal(generated(attached, ROWS, COUNT, strategy="early-exit{tokens=2}"), expected)


@settings(max_examples=examples(12))
@given(
    pieces=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6
    ),
    name=st.sampled_from(NAMES),
    tree=st.booleans(),
    early=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_advance_each_by_its_own(
    pieces: list[tuple[int, int, int]], name: str, tree: bool, early: bool, seed: int, texts: Any
) -> None:
    """Pieces of which each row keeps some first tokens: known before the step, or after it only."""
    program, with_tree, _ = texts(name)
    key = "test states" + " tree" * tree
    made = program.derived(key, lambda: with_tree if tree else graphopt.optimize(program, "insert-cache"))
    total = sum(size for size, _, _ in pieces) + 5
    ids = torch.randint(3, 100, (2, total), generator=torch.Generator().manual_seed(seed))
    whole = program(input_ids=ids)["logits"]
    decoder = CachedDecoder(made, 2, total)
    for size, *kept in pieces:
        counts, lengths = [min(k, size) for k in kept], list(decoder.lengths)
        piece = torch.stack([ids[row, lengths[row] : lengths[row] + size] for row in range(2)])
        if tree:
            order = torch.arange(size)
            slots = torch.tensor(lengths)[:, None] + order
            found = decoder.forward(
                piece, slots, slots, torch.ones(size, size, dtype=torch.bool).tril().expand(2, -1, -1),
                counts=counts if early else None,
            )["logits"]  # fmt: skip
            decoder.accept([list(range(count)) for count in counts])
        else:
            found = decoder.extend(piece, counts=counts if early else None)["logits"]
            decoder.advance(counts)
        for row in range(2):
            expected = whole[row, lengths[row] : lengths[row] + size]
            # with counts known before, what is not kept is not computed either
            until = counts[row] if early else size
            assert torch.allclose(found[row, :until], expected[:until], atol=2e-3), (row, lengths)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["", "{tree=true}"])
def test_exact_in_chunks(name: str, option: str, texts: Any) -> None:
    program, tree, _ = texts(name)
    made = tree if option else graphopt.optimize(program, "insert-cache", verify="off")
    for seed in range(2):
        found = compare_with_cache(program, made, tokens=21, seed=seed)
        assert found is not None
        assert found.error < 1e-11


def test_wrong_states_are_caught(texts: Any) -> None:
    """A state that forgets, one that counts what is not taken, and one that is left out altogether."""
    program, _, _ = texts("mamba2")
    made = graphopt.optimize(program, "insert-cache", verify="off")
    for operator in ("graphopt.causal_conv1d_state", "graphopt.linear_attention_state"):
        for change in ("all", "none"):
            broken = made.copy()
            node = next(n for n in broken.nodes if is_operator(n, operator))
            taken = broken.input_nodes["taken"]
            with broken.edit.before(node):
                like = torch.ops.aten.ones_like if change == "all" else torch.ops.aten.zeros_like
                other = broken.edit.call(like.default, taken)
            node.replace_input_with(taken, other)
            broken.changed()
            assert not compare_with_cache(program, broken).error < 1e-3, (operator, change)


def test_what_cannot_be_is_refused(texts: Any) -> None:
    program, _, _ = texts("mamba2")
    with pytest.raises(PassRefusedError, match="states have one size, whatever the length"):
        graphopt.optimize(program, "insert-cache{max_length=30}")
    with pytest.raises(graphopt.LoweringError, match="cache"):
        graphopt.optimize(program, "insert-cache").save_pretrained("nowhere")


@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_a_plan_without_one_of_the_states(name: str, texts: Any) -> None:
    """A state that is left out would be zero at every step."""
    program, _, _ = texts(name)
    plan = InsertCache().plan(program, Context())
    for left in [site for site in plan.sites if "state" in site.choices]:
        kept = [site for site in plan.sites if site is not left]
        with pytest.raises(PassRefusedError, match=f"leaves out {left.block}"):
            graphopt.optimize(program, "insert-cache", plan=[Plan(kept)])


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("lfm2", "skip-layers{remove=1}"),
        ("falcon_h1", "fuse-projections, fold-norms"),
        ("falcon_h1", "shard-tensor-parallel{size=2}"),
        ("mamba2", "quantize-weights{bits=8 group=16}"),
        ("qwen3_next", "shard-tensor-parallel{size=2}"),
    ],
)
def test_after_other_passes(name: str, passes: str, texts: Any) -> None:
    """The cached form of a changed program writes what the changed program writes, computed whole each time."""
    program, _, _ = texts(name)
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    changed = graphopt.optimize(program, passes, data=data)
    row = list(ROWS[0])
    for _ in range(8):
        row.append(int(changed(input_ids=torch.tensor([row]))["logits"][0, -1].argmax()))
    assert generated(changed, ROWS[:1], 8, kernels="exact")[0].tolist() == row[len(ROWS[0]) :]


def test_mixers_stay_whole_on_every_rank(texts: Any) -> None:
    """Attention and feed-forwards are shared out; a plan says why mixers are not."""
    program, _, _ = texts("falcon_h1")
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=2}")
    ids = torch.tensor(ROWS[:1])
    assert torch.allclose(sharded(input_ids=ids)["logits"], program(input_ids=ids)["logits"], atol=1e-4)
    refused = sharded.report.passes[-1].refused
    assert [r.block for r in refused] == ["mixer.0", "mixer.1"]
    assert all("every rank computes all of it" in r.reason for r in refused)


def test_cost_grows_with_the_tokens_alone(texts: Any) -> None:
    """A scan costs a token the same wherever it stands, unlike attention."""
    program, _, _ = texts("mamba2")
    short, long = (graphopt.cost(program, {"batch": 1, "sequence": n}) for n in (64, 128))
    assert abs(long.flops - 2 * short.flops) <= 1e-6 * long.flops
