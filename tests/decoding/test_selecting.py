"""Select and reuse: what is read follows from scores, nothing is forgotten, and candidates change nothing."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import VOCABULARY, Adversary
from test_policies import GROUPS, HEADS, LAYERS, PLACES, SIZE, TEXTS, Grouped

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.policies import Reading, Reuse, Select, as_policy
from graphopt.decoding.selecting import SelectingDecoder
from graphopt.ir.errors import GraphoptError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.running.retype import retyped

FEW = {"channels": 2, "recent": 2}


def policies(least: int = 2, most: int = 9) -> st.SearchStrategy[Reading]:
    """Small policies of both kinds."""
    budgets = st.integers(least, most)
    return st.one_of(
        st.builds(
            Select, budgets, channels=st.sampled_from([2, 4]), recent=st.just(2), dense=st.integers(0, 1)
        ),
        st.builds(Reuse, budgets, select=st.just((0,)), recent=st.just(2)),
    )


@pytest.fixture(scope="module")
def grouped() -> tuple[Grouped, Program]:
    module = Grouped(5).double().eval()
    return module, with_cache(graphopt.capture(module, {"input_ids": torch.randint(0, VOCABULARY, (2, 6))}))


def written(program: Program, rows: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """Return rows with what is written after them."""
    stream = graphopt.stream(program, rows, max_new_tokens=count, **options)
    list(stream)
    return stream.rows


class Lists:
    """One row token by token over lists, where each token reads what its scores by the channels say."""

    def __init__(self, module: Grouped, policy: Reading) -> None:
        self.module, self.policy = module, policy
        self.found: dict[int, list[int]] = {}
        self.held: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = [
            [[] for _ in range(GROUPS)] for _ in range(LAYERS)
        ]
        self.length = 0

    def channels(self, held: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[int]:
        """Return the channels in pairs in which the first keys are largest."""
        sizes = sum(key.abs() for key, _ in held[: self.policy.budget])
        half = SIZE // 2
        pairs = sorted(range(half), key=lambda i: float(sizes[i] + sizes[i + half]), reverse=True)
        return [c for i in pairs[: count // 2] for c in (i, i + half)]

    def chosen(self, layer: int, group: int, mean: torch.Tensor, whole: bool) -> list[int]:
        """Return which tokens the newest one reads."""
        policy, held = self.policy, self.held[layer][group]
        everything = list(range(len(held)))
        if whole or len(held) <= policy.budget or layer < policy.dense:
            return everything
        if isinstance(policy, Reuse) and layer not in policy.select:
            return self.found[group]
        places = list(range(SIZE)) if isinstance(policy, Reuse) else self.channels(held, policy.channels)
        scores = [float(mean[places] @ key[places]) for key, _ in held]
        newest = everything[-policy.recent :]
        others = sorted(everything[: -policy.recent], key=lambda i: scores[i], reverse=True)
        best = newest + others[: policy.budget - len(newest)]
        if isinstance(policy, Reuse):
            self.found[group] = best
            return everything
        return best

    def read(self, token: int, whole: bool) -> torch.Tensor:
        module = self.module
        x = module.embed(torch.tensor([[token]])) + module.places(torch.tensor([[self.length]]))
        for layer in range(LAYERS):
            q, k, v = module.projected(layer, x)
            mixed = torch.zeros_like(q)
            for group in range(GROUPS):
                held = self.held[layer][group]
                held.append((k[0, group, 0], v[0, group, 0]))
                heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
                mean = torch.stack([q[0, head, 0] for head in heads]).mean(0)
                chosen = self.chosen(layer, group, mean, whole)
                for head in heads:
                    logits = torch.stack([q[0, head, 0] @ held[i][0] for i in chosen]) / math.sqrt(SIZE)
                    weights = torch.softmax(logits, 0)
                    mixed[0, head, 0] = sum(w * held[i][1] for w, i in zip(weights, chosen, strict=True))
            x = module.after(layer, x, mixed)
        self.length += 1
        return module.head(x)[0, 0]


@settings(max_examples=16)
@given(
    text=st.lists(st.integers(0, VOCABULARY - 1), min_size=8, max_size=40),
    prompt=st.integers(1, 12), policy=policies(3, 8),
)  # fmt: skip
def test_it_reads_what_lists_of_tokens_read(
    text: list[int], prompt: int, policy: Reading, grouped: tuple[Grouped, Program]
) -> None:
    """Logits beside a recomputation token by token that shares no code: prompts read all, but for their last token."""
    module, program = grouped
    prompt = min(prompt, len(text))
    decoder = SelectingDecoder(program, 1, PLACES, policy)
    found = [decoder.prefill([text[:prompt]])[0]["logits"]]
    for token in text[prompt:]:
        found.append(decoder.extend(torch.tensor([[token]]))["logits"][0, -1])
        decoder.advance([1])
    lists = Lists(module, policy)
    with torch.no_grad():
        expected = [lists.read(token, n < prompt - 1) for n, token in enumerate(text)][prompt - 1 :]
    assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-9)


@settings(max_examples=15)
@given(rows=st.lists(TEXTS, min_size=1, max_size=3), policy=policies(60, 60))
def test_within_the_budget_it_is_the_whole(
    rows: list[list[int]], policy: Reading, grouped: tuple[Grouped, Program]
) -> None:
    program = grouped[1]
    texts = [
        graphopt.generate(program, rows, max_new_tokens=12, cache=cache).tolist()
        for cache in (policy, "full")
    ]
    assert texts[0] == texts[1]


@settings(max_examples=25)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=25), min_size=1, max_size=3),
    policy=policies(), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_text_with_candidates_is_the_text_without(
    rows: list[list[int]], policy: Reading, seed: int, grouped: tuple[Grouped, Program]
) -> None:
    """Every token of a tree chooses for itself what it reads; rejected ones are read by none."""
    program = grouped[1]
    plain = written(program, rows, 20, cache=policy)
    assert written(program, rows, 20, cache=policy, strategy=Adversary(seed, plain, 0.8)) == plain


@settings(max_examples=10)
@given(rows=st.lists(TEXTS, min_size=2, max_size=3), policy=policies())
def test_a_row_is_what_it_is_alone(
    rows: list[list[int]], policy: Reading, grouped: tuple[Grouped, Program]
) -> None:
    """Channels are chosen for each row, and rows share nothing."""
    program = grouped[1]
    for row, text in zip(rows, written(program, rows, 10, cache=policy), strict=True):
        assert written(program, [row], 10, cache=policy) == [text]


@pytest.mark.parametrize(
    ("model", "cache"),
    [
        *(
            (name, "select{budget=%d channels=2 recent=2 dense=0}")
            for name in ("gemma3", "gpt_oss", "deepseek_v3", "lfm2")
        ),
        *((name, "reuse{budget=%d select=[0] recent=2}") for name in ("deepseek_v3", "falcon_h1")),
    ],
)
def test_windows_sinks_latents_and_states(model: str, cache: str, captured: Callable[[str], Program]) -> None:
    """A budget beyond the text is no change; within it candidates are none."""
    program = retyped(captured(model), torch.float64)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 6, 7], [20, 21, 22]]

    def text(cache: str, strategy: Adversary | None = None) -> list[list[int]]:
        return written(program, rows, 20, cache=cache, strategy=strategy, eos_token_id=None)

    assert text(cache % 60) == text("full")
    plain = text(cache % 4)
    for seed in range(3):
        assert text(cache % 4, Adversary(seed, plain, 0.8)) == plain


@settings(max_examples=25)
@given(
    policy=policies(3, 8), seed=st.integers(0, 99),
    moves=st.lists(
        st.tuples(st.sampled_from(["read", "write", "back"]), st.integers(1, 14)), min_size=2, max_size=7
    ),
)  # fmt: skip
def test_rows_go_back_and_on(
    policy: Reading, seed: int, moves: list[tuple[str, int]], grouped: tuple[Grouped, Program]
) -> None:
    """Wrong if what was known of a text stayed after the row went back and on with another one."""
    program, draw = grouped[1], random.Random(seed)
    decoder = SelectingDecoder(program, 1, PLACES, policy)
    text: list[tuple[int, bool]] = []

    def write(decoder: SelectingDecoder, tokens: list[int]) -> torch.Tensor:
        for token in tokens:
            logits = decoder.extend(torch.tensor([[token]]))["logits"]
            decoder.advance([1])
        return logits

    for move, count in [*moves, ("write", 2)]:
        tokens = [draw.randrange(VOCABULARY) for _ in range(min(count, PLACES - 2 - len(text)))]
        if move == "back":
            text = text[: max(len(text) - count, 0)]
            decoder.lengths = [len(text)]
        elif tokens:
            if move == "read":
                decoder.prefill([tokens], whole=False)
            else:
                found = write(decoder, tokens)
            text += [(token, move == "read") for token in tokens]
    fresh = SelectingDecoder(program, 1, PLACES, policy)
    for read, part in itertools.groupby(text, key=lambda one: one[1]):
        tokens = [token for token, _ in part]
        if read:
            fresh.prefill([tokens], whole=False)
        else:
            expected = write(fresh, tokens)
    assert torch.allclose(found, expected, atol=1e-9)


def test_equal_scores_are_decided_alike_in_any_batch() -> None:
    """A model in which one token's queries are zero: all scores are equal, and rows of a batch have caches of other widths."""
    module = Grouped(3).double().eval()
    with torch.no_grad():
        for linear in module.q:
            linear.weight.zero_()
            linear.bias.zero_()
    program = with_cache(graphopt.capture(module, {"input_ids": torch.randint(0, VOCABULARY, (2, 6))}))
    rows = [[t % VOCABULARY for t in range(n)] for n in (30, 9, 1, 24)]
    for policy in (Select(4, dense=0, **FEW), Reuse(4, select=[0], recent=2)):
        together = SelectingDecoder(program, len(rows), PLACES, policy)
        found = [one["logits"] for one in together.prefill(rows)]
        for row, logits in zip(rows, found, strict=True):
            alone = SelectingDecoder(program, 1, PLACES, policy).prefill([row])[0]["logits"]
            assert torch.allclose(alone, logits, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "select", "reason"),
    [
        ("mistral", [0], "sees 5 tokens alone"),
        ("mistral", None, "no layer that sees everything is left to read"),
        ("llama", [1], "no layer that sees everything is left to read"),
        ("llama", [0, 1], "no layer that sees everything is left to read"),
    ],
)
def test_what_would_change_nothing_is_refused(
    model: str, select: list[int] | None, reason: str, captured: Callable[[str], Program]
) -> None:
    with pytest.raises(UsageError, match=reason):
        graphopt.generate(captured(model), [[5, 6]], max_new_tokens=2, cache=Reuse(16, select=select))


@pytest.mark.parametrize(
    ("free", "layers", "select"),
    [(range(32), 32, (2, 13)), (range(30), 30, (2, 12)), (range(12), 12, (2, 5)), (range(4), 4, (2,)), (range(3), 3, (0, 1)),
     (range(2), 2, (0,)), ((5, 11, 17, 23, 29), 30, (5, 17)), ((1,), 2, ()), ((), 2, ())],
)  # fmt: skip
def test_layers_that_choose_by_default(free: Sequence[int], layers: int, select: tuple[int, ...]) -> None:
    """Two as in the paper's 32 layers; fewer where few layers see everything, and one is left that reads."""
    assert Reuse(16).among(list(free), layers).select == select
    assert Reuse(16, select=[1]).among(list(free), layers).select == (1,)


@pytest.mark.parametrize("cache", ["reuse{budget=40}", "reuse{budget=4 recent=2}"])
def test_no_layers_need_be_named(cache: str, grouped: tuple[Grouped, Program]) -> None:
    rows = [[t % VOCABULARY for t in range(20)]]
    named = cache.replace("}", " select=[0]}")
    assert written(grouped[1], rows, 10, cache=cache) == written(grouped[1], rows, 10, cache=named)


@pytest.mark.parametrize("cache", [5, Select, ["window{budget=8}"]])
def test_what_is_no_policy(cache: object, grouped: tuple[Grouped, Program]) -> None:
    with pytest.raises(UsageError, match="it is a policy, or its name with options"):
        graphopt.generate(grouped[1], [[1, 2]], max_new_tokens=2, cache=cache)


def test_few_tokens_are_read(grouped: tuple[Grouped, Program]) -> None:
    """Values that were not chosen may be anything."""
    program = grouped[1]
    decoder = SelectingDecoder(program, 1, PLACES, Select(4, dense=0, **FEW))
    decoder.prefill([[t % VOCABULARY for t in range(60)]])
    before = decoder.extend(torch.tensor([[3]]))["logits"]
    whole = CachedDecoder(program, 1, PLACES)
    whole.prefill([[t % VOCABULARY for t in range(60)]])
    assert not torch.allclose(before, whole.extend(torch.tensor([[3]]))["logits"], atol=1e-3)
    values = next(buffer for name, buffer in decoder.buffers.items() if name[0] == "value_cache_0")
    changed = 0
    for slot in range(60):
        kept = values[0, :, slot].clone()
        values[0, :, slot] = 1e6
        changed += not torch.equal(decoder.extend(torch.tensor([[3]]))["logits"], before)
        values[0, :, slot] = kept
    assert changed <= 4 * GROUPS
    assert decoder.bytes > whole.bytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("select", "needs a budget"),
        ("select{budget=0}", "budget is 0"),
        ("select{budget=64 channels=3}", "an even number"),
        ("select{budget=8 recent=16}", "16 newest tokens do not fit"),
        ("select{budget=64 block=4}", "block"),
        ("reuse{budget=64 select=[]}", "it is a list of layers"),
        ("reuse{budget=64 dense=2}", "no option 'dense'"),
    ],
)
def test_wrong_options(text: str, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        as_policy(text)


def test_layers_are_whole_numbers() -> None:
    with pytest.raises(UsageError, match="each of select is -1"):
        Reuse(64, select=[2, -1])


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ("reuse{budget=16 select=[0 2]}", "select names layer 2, the program has caches in 2 layers"),
        ("select{budget=16 dense=2}", "are all of the 2 layers"),
    ],
)
def test_layers_that_are_not_there(cache: str, reason: str, grouped: tuple[Grouped, Program]) -> None:
    with pytest.raises(UsageError, match=reason):
        graphopt.generate(grouped[1], [[1, 2]], max_new_tokens=2, cache=cache)


def test_caches_in_few_bits_are_read_whole(grouped: tuple[Grouped, Program]) -> None:
    program = graphopt.optimize(grouped[1].copy(), "quantize-cache")
    with pytest.raises(UsageError, match="few bits are read whole"):
        graphopt.generate(program, [[1, 2]], max_new_tokens=2, cache="select{budget=16}")
