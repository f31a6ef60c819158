"""Several tokens a step: the same text whatever is proposed, the same distribution where tokens are drawn."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.decoding import Draft, Drafter, DraftProgram, PromptLookup, Sampling, TokenRecycling
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.drafts import Seen
from graphopt.decoding.generation import with_cache
from graphopt.decoding.speculating import Loop
from graphopt.decoding.stopping import Stop
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program

VOCABULARY = 7


class Small(nn.Module):
    """A decoder of two layers over few tokens, in float64, whose logits say something."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY, size: int = 8, sharp: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.places = nn.Embedding(vocabulary, size), nn.Embedding(64, size)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(2))
        self.ffn = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.head, self.sharp = nn.Linear(size, vocabulary), sharp

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, length = input_ids.shape
        x = self.embed(input_ids) + self.places(torch.arange(length))
        for qkv, ffn in zip(self.qkv, self.ffn, strict=True):
            q, k, v = qkv(x).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(batch, length, -1)
            x = x + torch.tanh(ffn(x))
        return {"logits": self.head(x) * self.sharp}


@pytest.fixture(scope="session")
def small() -> Callable[[int], Program]:
    made: dict[int, Program] = {}

    def program(seed: int) -> Program:
        if seed not in made:
            module = Small(seed).double().eval()
            made[seed] = graphopt.capture(module, {"input_ids": torch.randint(0, VOCABULARY, (2, 6))})
        return made[seed]

    return program


def plainly(program: Program, prompt: Sequence[int], count: int) -> list[int]:
    """Continue with the whole text through the program for each token, and no cache."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(program(input_ids=torch.tensor([row]))["logits"][0, -1].argmax()))
    return row


class Adversary(Drafter):
    """Proposes random trees, now and then with what the program will really take on some path."""

    name = "adversary"
    room = 12

    def __init__(self, seed: int, truth: list[list[int]], honest: float) -> None:
        self.draw, self.truth, self.honest = random.Random(seed), truth, honest

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        drafts = []
        for row in rows:
            tokens: list[int] = []
            parents: list[int] = []
            depths: list[int] = []
            whole = next((t for t in self.truth if t[: len(row)] == list(row)), list(row))
            for node in range(self.draw.randint(0, self.room)):
                parent = self.draw.randint(-1, node - 1)
                depth = 1 if parent < 0 else depths[parent] + 1
                place = len(row) + depth - 1
                right = whole[place] if place < len(whole) else 0
                token = right if self.draw.random() < self.honest else self.draw.randrange(VOCABULARY)
                tokens.append(token)
                parents.append(parent)
                depths.append(depth)
            drafts.append(Draft(tokens, parents))
        return drafts


class Oracle(Drafter):
    """Proposes what comes, or what does not."""

    name = "oracle"

    def __init__(self, truth: list[int], room: int, right: bool = True) -> None:
        self.truth, self.room, self.right = truth, room, right

    def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
        following = self.truth[len(row) : len(row) + min(room, self.room)]
        return Draft.line([t if self.right else (t + 1) % VOCABULARY for t in following])


PROMPTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    prompts=PROMPTS,
    seed=st.integers(0, 2),
    draft_seed=st.integers(0, 999),
    honest=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_whatever_is_proposed_the_text_is_the_same(
    prompts: list[list[int]], seed: int, draft_seed: int, honest: float, small: Any
) -> None:
    """P1, P2, P4 and P5: random trees for ragged rows; caches afterwards are those of a fresh start."""
    program = small(seed)
    expected = [plainly(program, p, 10) for p in prompts]
    decoder = CachedDecoder(with_cache(program), len(prompts), 6 + 10 + 12)
    loop = Loop(decoder, Adversary(draft_seed, expected, honest), Sampling(), Stop(10))
    rows = [list(p) for p in prompts]
    alive = list(range(len(rows)))
    for commits in loop.run(prompts):
        for commit in commits:
            rows[commit.row].extend(commit.tokens)
            assert 1 <= len(commit.tokens) <= 13
        alive = [commit.row for commit in commits if not commit.ended]
        # a row that has just ended may still stand in the last batch
        standing = alive or [commit.row for commit in commits]
        for place, row in enumerate(standing):
            if alive:
                assert decoder.lengths[place] == len(rows[row]) - 1, (
                    "the caches hold other tokens than were committed"
                )
    assert rows == expected
    if len(prompts) == 1:
        fresh = CachedDecoder(with_cache(program), 1, 28)
        fresh.prefill([rows[0][: decoder.lengths[0]]])
        for name, buffer in decoder.buffers.items():
            length = decoder.lengths[0]
            assert torch.allclose(buffer[:, :, :length], fresh.buffers[name][:, :, :length], atol=1e-12), name


@settings(max_examples=10, deadline=None)
@given(room=st.integers(1, 5), count=st.integers(1, 14), seed=st.integers(0, 2))
def test_steps_of_one_who_knows_and_of_one_who_is_always_wrong(
    room: int, count: int, seed: int, small: Any
) -> None:
    """P3: ceil(n / (room + 1)) steps, and n."""
    program = small(seed)
    truth = plainly(program, [1, 2], count + room)
    for right, steps in ((True, -(-count // (room + 1))), (False, count)):
        found = graphopt.stream(program, [[1, 2]], max_new_tokens=count, strategy=Oracle(truth, room, right))
        for _ in found:
            pass
        assert found.rows[0] == truth[: 2 + count]
        assert found.statistics.steps == steps
        assert found.statistics.tokens == count


@pytest.mark.parametrize(
    "make", [PromptLookup, TokenRecycling, lambda: TokenRecycling(2, (2, 2, 1)), "draft", "itself"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_strategy_writes_the_same(make: Any, seed: int, small: Any) -> None:
    program = small(seed)
    prompts = [[1, 2, 3, 1, 2], [0], [6, 6, 6]]
    strategy = DraftProgram(small(seed if make == "itself" else 2), 3) if isinstance(make, str) else make()
    expected = torch.tensor([plainly(program, p, 16)[len(p) :] for p in prompts])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(
            graphopt.generate(program, prompts, max_new_tokens=16, strategy=strategy)[:, -16:], expected
        )
        found = graphopt.stream(program, prompts, max_new_tokens=16, strategy=strategy)
        for _ in found:
            pass
    assert found.statistics.steps <= 16
    if make == "itself":
        assert found.statistics.acceptance == [1.0, 1.0, 1.0], (
            "a program drafts for itself and is not believed"
        )
        assert found.statistics.steps == 4


def odds_of(
    program: Program, prompt: list[int], sampling: Sampling, count: int
) -> dict[tuple[int, ...], float]:
    """Enumerate continuations with their probabilities."""
    found = {(): 1.0}
    for _ in range(count):
        longer = {}
        for tokens, odds in found.items():
            logits = program(input_ids=torch.tensor([[*prompt, *tokens]]))["logits"][0, -1]
            for token, each in enumerate(sampling.distribution(logits).tolist()):
                if each > 0:
                    longer[*tokens, token] = odds * each
        found = longer
    return found


@pytest.mark.parametrize(
    ("sampling", "strategy"),
    [
        ({"temperature": 1.5}, "draft"), ({"temperature": 3.0, "top_k": 4}, "draft"),
        ({"temperature": 2.0, "top_p": 0.8}, "draft"), ({"temperature": 3.0}, "tree"), ({"temperature": 2.0}, None),
    ],
)  # fmt: skip
def test_drawn_text_has_the_programs_distribution(
    sampling: dict[str, Any], strategy: str | None, small: Any
) -> None:
    """K2, by counting two tokens at a time against their enumerated odds: chi-square at a thousandth."""
    from scipy.stats import chi2

    program, prompt, draws = with_cache(small(0)), [3, 1], 1500
    expected = odds_of(small(0), prompt, Sampling(**sampling), 2)
    drafter: Drafter | None = None
    if strategy == "draft":
        drafter = DraftProgram(with_cache(small(1)), 2)
    elif strategy == "tree":
        drafter = Adversary(5, [plainly(small(0), prompt, 4)], 0.5)
    batch = 300
    counted: Counter[tuple[int, ...]] = Counter()
    for round_ in range(draws // batch):
        decoder = CachedDecoder(program, batch, 20)
        rows: list[list[int]] = [[] for _ in range(batch)]
        for commits in Loop(decoder, drafter, Sampling(**sampling), Stop(2), seed=round_).run(
            [prompt] * batch
        ):
            for commit in commits:
                rows[commit.row].extend(commit.tokens)
        counted.update(tuple(row) for row in rows)
    assert set(counted) <= set(expected), "tokens of no probability were drawn"
    likely = {t: o for t, o in expected.items() if o * draws >= 5}
    rest = 1 - sum(likely.values())
    statistic = sum((counted[t] - o * draws) ** 2 / (o * draws) for t, o in likely.items())
    if rest * draws >= 1:
        others = draws - sum(counted[t] for t in likely)
        statistic += (others - rest * draws) ** 2 / (rest * draws)
    assert statistic < chi2.ppf(0.999, len(likely)), (statistic, len(likely))


def test_seeds_have_the_distribution_one_by_one(small: Any) -> None:
    """Over seeds, not over rows: candidates that were the same for every seed would bend what a user draws."""
    from scipy.stats import chi2

    program, draft, prompt = with_cache(small(0)), with_cache(small(1)), [3, 1]
    sampling = Sampling(10.0)  # at which the draft is sure of nothing
    expected = odds_of(small(0), prompt, sampling, 1)
    decoder, drafter, draws = CachedDecoder(program, 1, 12), DraftProgram(draft, 1), 600
    counted: Counter[int] = Counter()
    for seed in range(draws):
        decoder.lengths = [0]
        loop = Loop(decoder, drafter, sampling, Stop(2), seed=seed)
        counted[next(iter(loop.run([prompt])))[0].tokens[0]] += 1
        assert loop.statistics.proposed == [1], "nothing was proposed, so nothing is shown"
        assert not loop.statistics.notes
    statistic = sum((counted[t] - o * draws) ** 2 / (o * draws) for (t,), o in expected.items())
    assert statistic < chi2.ppf(0.999, len(expected) - 1), (statistic, counted)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=9), st.floats(0.01, 1.0))
def test_typical_acceptance_takes_what_is_likely(logits: list[float], epsilon: float) -> None:
    sampling = Sampling(1.0, typical=epsilon)
    odds = sampling.distribution(torch.tensor(logits))
    entropy = float(torch.distributions.Categorical(odds).entropy())
    threshold = min(epsilon, epsilon**0.5 * torch.exp(torch.tensor(-entropy)).item())
    fine = sampling.acceptable(odds)
    assert (
        bool(fine[odds.argmax()]) == (float(odds.max()) > threshold)
        or abs(float(odds.max()) - threshold) < 1e-6
    )
    assert all(bool(f) <= (float(p) > threshold - 1e-6) for f, p in zip(fine, odds, strict=True))


def test_typical_acceptance_is_another_text_and_says_so(small: Any) -> None:
    program = small(0)
    truth = plainly(program, [1, 2], 20)
    options = {"max_new_tokens": 12, "temperature": 4.0, "seed": 3}
    exact = graphopt.stream(program, [[1, 2]], strategy=Oracle(truth, 4), **options)
    loose = graphopt.stream(program, [[1, 2]], strategy=Oracle(truth, 4), typical_acceptance=0.05, **options)
    for found in (exact, loose):
        for _ in found:
            pass
    assert loose.statistics.steps < exact.statistics.steps
    assert loose.statistics.notes and not exact.statistics.notes
    for wrong in (
        {"temperature": 0.0, "typical_acceptance": 0.1},
        {"temperature": 1.0, "typical_acceptance": 0.0},
    ):
        with pytest.raises(UsageError, match="typical acceptance takes"):
            graphopt.generate(program, [[1]], max_new_tokens=2, **wrong)


def test_ends_inside_of_a_commit(small: Any) -> None:
    """K6: nothing stands after an end, and token 0 is a token like others."""
    program = small(0)
    truth = plainly(program, [4, 2], 14)
    for place in range(2, 12):
        end = truth[place]
        first = truth.index(end, 2)
        for strategy in (None, Oracle(truth, 5)):
            found = graphopt.generate(
                program, [[4, 2]], max_new_tokens=14, eos_token_id=end, strategy=strategy
            )
            assert found[0].tolist() == truth[: first + 1]
    run = truth[5:7]
    first = next(i for i in range(3, 14) if truth[i - 1 : i + 1] == run)
    found = graphopt.generate(program, [[4, 2]], max_new_tokens=14, stop=[run], strategy=Oracle(truth, 5))
    assert found[0].tolist() == truth[: first + 1]
    rows = graphopt.generate(
        program, [[4, 2], [1]], max_new_tokens=14, eos_token_id=truth[3], strategy=Oracle(truth, 5)
    )
    alone = graphopt.generate(program, [[1]], max_new_tokens=14, eos_token_id=truth[3])
    assert rows[1, 2 : 2 + alone.shape[1] - 1].tolist() == alone[0, 1:].tolist(), (
        "a row was changed by another's end"
    )


def test_token_zero_is_accepted_only_where_it_is_taken(small: Any) -> None:
    """Padding must never pass for a candidate: rows whose next token is 0, beside rows with longer candidates."""
    program = small(0)
    biased = program.copy()
    head = next(n for n, w in biased.weights.items() if w.name == "head.bias")
    from dataclasses import replace

    from graphopt.ir.weights import InMemory

    bias = biased.weights[head].source.load().clone()
    bias[0] += 1.5
    biased.weights[head] = replace(biased.weights[head], source=InMemory(bias))
    prompts = [[1, 2], [5]]
    expected = [plainly(biased, p, 12) for p in prompts]
    assert any(0 in row[len(p) :] for row, p in zip(expected, prompts, strict=True))

    class Uneven(Drafter):
        room = 6

        def propose_row(self, number: int, row: Sequence[int], room: int) -> Draft:
            return Draft([0, 3, 2, 1], [-1, -1, 0, 1]) if number else Draft()

    found = graphopt.stream(biased, prompts, max_new_tokens=12, strategy=Uneven())
    for _ in found:
        pass
    assert found.rows == expected


@pytest.mark.parametrize("what", ["begin", "propose", "observe", "tokens", "rows"])
def test_who_fails_in_the_middle_loses_no_token(what: str, small: Any) -> None:
    program = small(1)
    truth = plainly(program, [2, 5], 12)

    class Failing(Oracle):
        def begin(self, *given: Any) -> None:
            super().begin(*given)
            if what == "begin":
                raise RuntimeError("no")

        def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
            if what == "propose" and len(rows[0]) > 5:
                raise RuntimeError("no")
            if what == "tokens" and len(rows[0]) > 5:
                return [Draft.line([VOCABULARY])]
            return [] if what == "rows" else super().propose(rows, room)

        def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
            if what == "observe":
                raise RuntimeError("no")

    found = graphopt.stream(program, [[2, 5]], max_new_tokens=12, strategy=Failing(truth, 2))
    with pytest.warns(RuntimeWarning, match="decoding continues without candidates"):
        for _ in found:
            pass
    assert found.rows[0] == truth
    assert len(found.statistics.notes) == 1


def test_drafts_that_are_no_trees_are_refused() -> None:
    with pytest.raises(UsageError, match="parents before children"):
        Draft([1, 2], [1, -1])
    with pytest.raises(UsageError, match="belong to a chain"):
        Draft([1, 2], [-1, -1], [torch.ones(3), torch.ones(3)])
    for wrong in (lambda: PromptLookup(0), lambda: PromptLookup(2, 1, 2), lambda: TokenRecycling(0)):
        with pytest.raises(UsageError):
            wrong()


def test_a_draft_of_other_tokens_is_refused(small: Any) -> None:
    other = Small(0, vocabulary=9).double().eval()
    draft = graphopt.capture(other, {"input_ids": torch.randint(0, 9, (2, 6))})
    with pytest.raises(UsageError, match="9 tokens, the program 7"):
        graphopt.generate(small(0), [[1]], max_new_tokens=3, strategy=DraftProgram(draft, 2))


@settings(max_examples=20, deadline=None)
@example([4.999999999999999, 5.0, 0.0], 2, 0.05, 1.0)
@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=9),
    st.integers(1, 9),
    st.floats(0.05, 1.0),
    st.floats(0.1, 4),
)
def test_probabilities_are_those_that_were_asked_for(logits: list[float], k: int, p: float, t: float) -> None:
    # what the function sees: two logits that differ in float64 may be one number here
    given_ = torch.tensor(logits)
    whole = torch.softmax(given_.double() / t, -1)
    found = Sampling(t, top_k=k, top_p=p).distribution(given_)
    assert abs(float(found.sum()) - 1) < 1e-9
    assert float(whole[found > 0].max()) == float(whole.max()), "the most likely token went"
    kept = found > 0
    assert float(whole[kept].min()) >= float(whole[~kept].max() if (~kept).any() else 0) - 1e-6
    assert torch.equal(Sampling(t).distribution(given_), whole)
