"""Mask tokens: ordinary tokens never notice them, what they say is what a row with them alone says, and they learn."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from written_texts import varied

import graphopt
from graphopt.decoding import MaskTokens
from graphopt.decoding.drafts import Draft, Drafter
from graphopt.ir.errors import PassRefusedError, PipelineError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.running.retype import retyped
from graphopt.ir.weights import InMemory
from graphopt.training import Settings
from graphopt.training.recipes import MaskTokens as Recipe

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
ROWS = [[5, 3, 9, 5, 3], [7], [11, 4, 11]]
PASSES = "attach-mask-tokens{masks=3 rank=4}, insert-cache{tree=true}"


def shaken(program: Program, seed: int = 0, size: float = 0.3) -> Program:
    """Return the program with mask tokens, LoRA and sampler that say something."""
    made = program.copy()
    generator = torch.Generator().manual_seed(seed)
    for node, weight in list(made.weights.items()):
        if weight.name.startswith("mask_tokens."):
            drawn = torch.randn(weight.source.shape, generator=generator).to(weight.source.dtype)
            made.weights[node] = weight.with_source(InMemory(weight.source.load() + size * drawn))
    made.changed()
    return made


def beside(
    program: Program, rows: torch.Tensor, parents: Sequence[int], marks: Sequence[int]
) -> dict[str, Any]:
    """Run a program with a cache on a row of tokens and mask tokens, each after the one it follows."""
    length, count = rows.shape[1], rows.shape[1] + len(marks)
    depths, mine = list(range(length)), [{*range(n + 1)} for n in range(length)]
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1)
        mine.append({*mine[parent], length + node})
    caches = {
        n: torch.zeros(len(rows), spec.shape[1], count, spec.shape[3], dtype=spec.dtype)  # type: ignore[arg-type]
        for n, spec in program.signature.inputs.items()
        if "_cache_" in n
    }
    many = len(rows)
    found: dict[str, Any] = program(
        input_ids=torch.cat([rows, torch.zeros(many, len(marks), dtype=rows.dtype)], 1),
        position_ids=torch.tensor(depths).expand(many, -1),
        cache_slots=torch.arange(count).expand(many, -1),
        step_mask=torch.tensor([[b in seen for b in range(count)] for seen in mine]).expand(many, -1, -1),
        mask_index=torch.tensor([0] * length + list(marks)).expand(many, -1),
        sampler_ids=torch.cat([rows[:, 1:], torch.full((many, 1 + len(marks)), 7)], 1),
        **caches,
    )
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_ordinary_tokens_stay_as_they_are(name: str, captured: Callable[[str], Program]) -> None:
    """Bit for bit whatever LoRA holds; wrong if a gate leaked, or the embedding were touched."""
    program = captured(name)
    made = graphopt.optimize(program, "attach-mask-tokens{rank=4}")
    expected = program(input_ids=IDS)["logits"]
    for done in (made, shaken(made)):
        assert torch.equal(done(input_ids=IDS)["logits"], expected)
        marked = done(input_ids=IDS, mask_index=torch.tensor([[0] * 7 + [1, 2]] * 2))
        assert torch.equal(marked["logits"][:, :7], expected[:, :7]), (
            "later mask tokens change earlier tokens"
        )
    assert not torch.allclose(marked["logits"][:, 7:], expected[:, 7:], atol=1e-3)
    begun = made(input_ids=IDS)
    assert torch.allclose(begun["mask_logits"], begun["logits"], atol=1e-5), "the sampler begins as the head"
    published = graphopt.optimize(program, "attach-mask-tokens{rank=4 residual=false}")(input_ids=IDS)
    assert not torch.allclose(published["mask_logits"], begun["logits"], atol=1e-2)
    for on in ("attention", "feed-forward"):
        if name == "mixtral" and on == "feed-forward":
            with pytest.raises(PassRefusedError, match="its rows are not"):
                graphopt.optimize(program, f"attach-mask-tokens{{on={on}}}")
            continue
        part = graphopt.optimize(program, f"attach-mask-tokens{{rank=4 on={on}}}")
        assert len(part.weights) < len(made.weights) or name == "mixtral"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_text_does_not_see_masks_and_blocks_do_not_see_each_other(
    name: str, captured: Callable[[str], Program]
) -> None:
    made = retyped(shaken(graphopt.optimize(captured(name), PASSES)))
    together = beside(made, IDS, [3, 9, 10, 8, 12, 13], [1, 2, 3, 1, 2, 3])
    alone = beside(made, IDS, [], [])
    assert torch.allclose(together["logits"][:, :9], alone["logits"], atol=1e-10)
    for anchor, first in ((3, 9), (8, 12)):
        only = beside(made, IDS[:, : anchor + 1], [anchor, anchor + 1, anchor + 2], [1, 2, 3])
        for output in ("mask_hidden", "logits"):
            assert torch.allclose(
                together[output][:, first : first + 3], only[output][:, anchor + 1 :], atol=1e-10
            ), "a mask token sees what is not before it"


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_whatever_mask_tokens_say_the_text_is_the_same(
    name: str, layout: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    options: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": None}
    expected = graphopt.generate(program, ROWS, **options)
    for made in (graphopt.optimize(program, PASSES), shaken(graphopt.optimize(program, PASSES), 3)):
        for tokens in ("", " tokens=2"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                found = graphopt.generate(
                    made, ROWS, strategy=f"mask-tokens{{layout={layout}{tokens}}}", **options
                )
            assert torch.equal(found, expected)
        assert torch.equal(graphopt.generate(made, ROWS, **options), expected)


class Probing(Drafter):
    """Proposes random trees, half of them right, with random mask tokens behind any of their nodes."""

    name, room = "probing", 14

    def __init__(self, seed: int, truth: list[list[int]]) -> None:
        self.draw, self.truth = random.Random(seed), truth

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        whole = next(t for t in self.truth if t[: len(row)] == list(row))
        tokens: list[int] = []
        parents: list[int] = []
        for node in range(self.draw.randint(0, 5)):
            parents.append(self.draw.randint(-1, node - 1))
            place = len(row) + Draft([*tokens, 0], parents).depths[-1] - 1
            right = whole[place] if place < len(whole) else 0
            tokens.append(right if self.draw.random() < 0.5 else self.draw.randrange(90))
        count = len(tokens)
        probes = [
            (self.draw.randint(-1, count + n - 1), self.draw.randint(1, 3))
            for n in range(self.draw.randint(0, 9))
        ]
        return Draft(tokens, parents, [], probes)


@settings(max_examples=examples(18), deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_mask_tokens_anywhere_change_no_text(seed: int, rows: list[list[int]], noisy: Program) -> None:
    """Wrong if one were committed, kept in a cache, or seen by a candidate."""
    expected = graphopt.generate(noisy, rows, max_new_tokens=9, eos_token_id=None)
    truth = graphopt.stream(noisy, rows, max_new_tokens=9, eos_token_id=None)
    for _ in truth:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # who fails is left out, which would hide everything
        found = graphopt.generate(
            noisy, rows, max_new_tokens=9, eos_token_id=None, strategy=Probing(seed, truth.rows)
        )
    assert torch.equal(found, expected)


@pytest.fixture(scope="session")
def noisy(captured: Callable[[str], Program]) -> Program:
    return shaken(graphopt.optimize(captured("llama"), PASSES))


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
def test_candidates_are_what_mask_tokens_after_the_row_say(
    layout: str, captured: Callable[[str], Program]
) -> None:
    """Wrong if the block of another candidate were taken after some were accepted and others not."""
    made = shaken(graphopt.optimize(captured("llama"), PASSES), 5, size=0.05)
    asked: list[tuple[list[int], list[int]]] = []

    class Watched(MaskTokens):
        def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
            drafts = super().propose(rows, room)
            asked.extend((list(r), d.tokens) for r, d in zip(rows, drafts, strict=True))
            return drafts

    stream = graphopt.stream(
        made, [[5, 3, 9], [7, 7]], max_new_tokens=16, eos_token_id=None, strategy=Watched(layout=layout)
    )
    for _ in stream:
        pass
    seen = 0
    for row, tokens in asked:
        if not tokens:
            continue
        # mask tokens stood before the row's last token was known
        whole = torch.tensor([row[:-1]])
        hidden = beside(made, whole, [len(row) - 2, len(row) - 1, len(row)], [1, 2, 3])["mask_hidden"][:, -3:]
        before, expected = row[-1], []
        for place in range(len(tokens)):
            said = sampled(made, hidden[:, place], before)
            expected.append(before := int(said.argmax()))
        assert tokens == expected
        seen += 1
    assert seen > 5
    assert sum(stream.statistics.accepted) or layout == "linear", "nothing was accepted, so nothing was tried"


def sampled(program: Program, hidden: torch.Tensor, before: int) -> torch.Tensor:
    """The sampler by hand, from its weights."""
    held = {w.name: w.source.load() for w in program.weights.values()}

    def layer(x: torch.Tensor, name: str) -> torch.Tensor:
        s = f"mask_tokens.sampler.{name}"
        y = F.silu(x @ held[f"{s}.weight"].T)
        return F.layer_norm(y, y.shape[-1:], held[f"{s}.norm.weight"], held[f"{s}.norm.bias"])

    u = layer(torch.cat([held["model.embed_tokens.weight"][before][None], hidden], -1), "input")
    return (hidden + layer(u, "hidden")) @ held["lm_head.weight"].T


def test_the_loss_is_that_of_each_place_alone(captured: Callable[[str], Program]) -> None:
    """Mask tokens beside a text give the loss of one row for each place; targets are those j + 1 places on."""
    made = shaken(graphopt.optimize(captured("llama"), PASSES))
    recipe = Recipe(anchors=3, head=1.0, sampler=0.5, consistency=0.25).recipe(made)
    torch.manual_seed(0)
    batch = recipe.transform({"input_ids": IDS}, 0.0)
    found = float(recipe.loss(made.module(), batch))
    total, count = 0.0, 0
    for row, anchors in zip(IDS, batch["anchors"].tolist(), strict=True):
        whole = beside(made, row[None], [], [])
        for p in anchors:
            values = beside(made, row[None, : p + 1], [p, p + 1, p + 2], [1, 2, 3])
            for j in (1, 2, 3):
                if p + j + 1 >= len(row):
                    continue
                target, z = row[p + j + 1][None], values["mask_hidden"][:, p + j]
                head = F.cross_entropy(values["logits"][:, p + j], target)
                sampler = F.cross_entropy(sampled(made, z, int(row[p + j])), target)
                apart = (z - whole["mask_hidden"][:, p + j]).square().mean()
                total += float(head + 0.5 * sampler + 0.25 * apart)
                count += 1
    assert count
    assert found == pytest.approx(total / count, rel=1e-4)
    masked = {**batch, "loss_mask": torch.ones_like(IDS)}
    assert float(recipe.loss(made.module(), masked)) == pytest.approx(found, rel=1e-6)
    masked["loss_mask"][1] = 0
    assert float(recipe.loss(made.module(), masked)) != pytest.approx(found, rel=1e-3)


def test_they_learn_and_the_model_does_not(captured: Callable[[str], Program]) -> None:
    program = varied("llama", captured("llama"))[0]
    made = graphopt.optimize(program, PASSES)
    text = torch.arange(40).remainder(10).add(20)
    data = [{"input_ids": torch.stack([text[s : s + 16] for s in range(4)])}]
    done, record = graphopt.train(
        made, "mask-tokens{anchors=6 consistency=0}", data, Settings(steps=60, learning_rate=2e-2, warmup=0)
    )
    assert record.losses[-1] < 0.5 * record.losses[0]
    for name, weight in done.weights.items():
        if not weight.name.startswith("mask_tokens."):
            assert torch.equal(weight.source.load(), made.weights[name].source.load()), (
                f"{weight.name} was trained"
            )
    said = beside(done, text[None, :8], [7, 8, 9], [1, 2, 3])
    assert said["logits"][0, -3:].argmax(-1).tolist() == text[9:12].tolist(), "they say another place's token"


def test_what_cannot_be_is_refused(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    masked = graphopt.optimize(program, "attach-mask-tokens{rank=2}")
    with pytest.raises(UsageError, match="has no mask tokens"):
        Recipe().recipe(program)
    with pytest.raises(UsageError, match="whose attention mask is an input"):
        Recipe().recipe(masked)
    with pytest.raises(PipelineError, match="cannot run on a program that is cached"):
        graphopt.optimize(graphopt.optimize(program, "insert-cache{tree=true}"), "attach-mask-tokens")
    with pytest.raises(UsageError, match="layout is quadratic or linear"):
        MaskTokens(layout="cubic")
    with pytest.raises(UsageError, match="has no mask tokens"):
        graphopt.generate(program, [[5, 3]], max_new_tokens=3, strategy="mask-tokens")
    with pytest.raises(UsageError, match="3 mask tokens, 5 are asked for"):
        graphopt.generate(masked, [[5, 3]], max_new_tokens=3, strategy="mask-tokens{tokens=5}")
    fixed = graphopt.optimize(masked, "insert-cache{tree=true max_length=20}")
    recipe = Recipe(anchors=7).recipe(fixed)
    with pytest.raises(UsageError, match="slots, the program's caches have 20"):
        recipe.loss(fixed.module(), recipe.transform({"input_ids": IDS}, 0.0))


def test_saved_and_loaded(captured: Callable[[str], Program], tmp_path: Any) -> None:
    made = shaken(graphopt.optimize(captured("llama"), PASSES))
    again = graphopt.load(made.save(tmp_path / "saved"))
    expected = beside(made, IDS, [8, 9], [1, 2])
    for name, value in beside(again, IDS, [8, 9], [1, 2]).items():
        assert torch.equal(value, expected[name])
