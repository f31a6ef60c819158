"""Caches of bounded size: beside a reference that holds lists of tokens, and what must hold whatever is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import VOCABULARY, Adversary
from torch import nn

import graphopt
from graphopt.decoding.bounded import BoundedDecoder
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.policies import (
    ByLayer,
    Episode,
    HeavyHitters,
    Held,
    KeyNorm,
    Merge,
    Observed,
    Policy,
    Random,
    Select,
    Window,
    as_policy,
)  # fmt: skip
from graphopt.decoding.step import number_of
from graphopt.ir.errors import GraphoptError, PassRefusedError, UsageError
from graphopt.ir.program import Program

HEADS, GROUPS, SIZE, PLACES, LAYERS = 4, 2, 4, 96, 2


class Grouped(nn.Module):
    """A decoder in float64 whose query heads share key heads, with sharp attention so that policies tell tokens apart."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = HEADS * SIZE
        self.embed, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(PLACES, width)
        self.q = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * GROUPS * SIZE) for _ in range(LAYERS))
        self.ffn = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.head = nn.Linear(width, VOCABULARY)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1.5)

    def projected(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values: (batch, heads, tokens, size)."""
        batch, length, _ = x.shape
        q = self.q[layer](x).view(batch, length, HEADS, SIZE).transpose(1, 2)
        k, v = self.kv[layer](x).view(batch, length, 2, GROUPS, SIZE).permute(2, 0, 3, 1, 4)
        return q, k, v

    def after(self, layer: int, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Return the stream after a layer's attention."""
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        return x + torch.tanh(self.ffn[layer](x))

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in range(LAYERS):
            q, k, v = self.projected(layer, x)
            k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
            x = self.after(layer, x, nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return {"logits": self.head(x)}


@pytest.fixture(scope="module")
def grouped() -> tuple[Grouped, Program]:
    module = Grouped().double().eval()
    return module, with_cache(graphopt.capture(module, {"input_ids": torch.randint(0, VOCABULARY, (2, 6))}))


def recurrent(folder: Path, kind: str, **options: Any) -> Program:
    """Return a small model of transformers whose layers have states."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, **options,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).eval().save_pretrained(folder)
    return graphopt.capture(folder)


@pytest.fixture(scope="module")
def falcon_h1(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Attention and a state side by side in every layer."""
    return recurrent(
        tmp_path_factory.mktemp("falcon_h1"), "FalconH1", intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=16, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """States alone."""
    return recurrent(tmp_path_factory.mktemp("mamba"), "Mamba", state_size=4)


class Lists:
    """One row token by token; each layer and head holds a list of tokens, each with its position, key, value and scores."""

    def __init__(self, module: Grouped, policy: Policy | ByLayer) -> None:
        self.module, self.length = module, 0
        self.policies = policy.policies if isinstance(policy, ByLayer) else [policy] * LAYERS
        self.held: list[list[list[dict[str, Any]]]] = [[[] for _ in range(GROUPS)] for _ in range(LAYERS)]

    def read(self, token: int) -> torch.Tensor:
        """Return the logits after one token; cut whenever a block is full."""
        module = self.module
        x = module.embed(torch.tensor([[token]])) + module.places(torch.tensor([[self.length]]))
        for layer in range(LAYERS):
            q, k, v = module.projected(layer, x)
            mixed = torch.zeros_like(q)
            for group in range(GROUPS):
                held = self.held[layer][group]
                held.append({"p": self.length, "k": k[0, group, 0], "v": v[0, group, 0], "paid": []})
                paid = torch.zeros(len(held), dtype=torch.float64)
                for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                    scores = torch.stack([q[0, head, 0] @ t["k"] for t in held]) / math.sqrt(SIZE)
                    weights = torch.softmax(scores, 0)
                    mixed[0, head, 0] = sum(w * t["v"] for w, t in zip(weights, held, strict=True))
                    paid += weights
                for share, one in zip(paid.tolist(), held, strict=True):
                    one["paid"].append(share)
            x = module.after(layer, x, mixed)
        self.length += 1
        if self.length % self.policies[0].block == 0:
            self.held = [
                [self.cut(policy, one) for one in layer]
                for policy, layer in zip(self.policies, self.held, strict=True)
            ]
        return module.head(x)[0, 0]

    def cut(self, policy: Policy, held: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(held) <= policy.budget:
            return held
        recent: int = getattr(policy, "recent", getattr(policy, "window", 0))
        free = held[: len(held) - recent]
        if isinstance(policy, Window):
            worth = [float(t["p"]) for t in free]
        elif isinstance(policy, KeyNorm):
            worth = [-float(t["k"].norm()) for t in free]
        elif isinstance(policy, HeavyHitters):
            worth = [sum(t["paid"]) for t in free]
        else:
            assert isinstance(policy, Observed)
            last = [sum(t["paid"][-policy.window :]) for t in free]
            reach = policy.pool // 2
            worth = [sum(last[max(0, i - reach) : i + reach + 1]) for i in range(len(free))]
        must = [t for t in held if t["p"] < policy.sinks or t in held[len(free) :]]
        order = sorted(range(len(free)), key=lambda i: worth[i], reverse=True)
        best = [free[i] for i in order if free[i] not in must][: policy.budget - len(must)]
        return sorted((*must, *best), key=lambda t: int(t["p"]))


def the_same_tokens(decoder: BoundedDecoder, row: int) -> list[list[list[int]]]:
    """Return the positions that each layer and head of a row holds."""
    return [held[row, :, : decoder.filled_of(layer)[row]].tolist() for layer, held in decoder.held.items()]


POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "window": lambda budget, block: Window(budget, block, sinks=2),
    "heavy-hitters": lambda budget, block: HeavyHitters(budget, block, sinks=1),
    "observed": lambda budget, block: Observed(budget, block, sinks=1, window=3, pool=3),
    "key-norm": lambda budget, block: KeyNorm(budget, block, sinks=0),
    "merge": lambda budget, block: Merge(budget, block, sinks=2, chunk=5),
    "random": lambda budget, block: Random(budget, block, sinks=2, seed=3),
    "episode": lambda budget, block: Episode(budget, block, sinks=2, probe=(1, 4, 2), recent=2),
}
# a budget for all layers or one for each, and a block
CUTS = st.tuples(
    st.one_of(st.integers(6, 12), st.tuples(st.integers(6, 12), st.integers(6, 12))), st.integers(1, 7)
)


def policy_of(name: str, cuts: tuple[int | tuple[int, int], int]) -> Policy | ByLayer:
    """Return a policy with one budget or several."""
    budget, block = cuts
    if isinstance(budget, int):
        return POLICIES[name](budget, block)
    return ByLayer([POLICIES[name](one, block) for one in budget])


TEXTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(["window", "heavy-hitters", "observed", "key-norm"]), cuts=CUTS, text=TEXTS)
def test_what_is_held_and_written_is_that_of_lists_of_tokens(
    name: str, cuts: tuple[int | tuple[int, int], int], text: list[int], grouped: tuple[Grouped, Program]
) -> None:
    """Logits, tokens held and scores beside a recomputation in float64 that shares no code; wrong if a score went astray."""
    module, program = grouped
    policy = policy_of(name, cuts)
    decoder, lists = BoundedDecoder(program, 1, PLACES, policy), Lists(module, policy)
    for first in range(0, len(text), 9):
        found = decoder.prefill([text[first : first + 9]])
        with torch.no_grad():
            logits = [lists.read(token) for token in text[first : first + 9]][-1]
        assert torch.allclose(found[0]["logits"], logits, atol=1e-9)
    assert the_same_tokens(decoder, 0) == [[[t["p"] for t in one] for one in layer] for layer in lists.held]
    if name == "heavy-hitters":
        for (buffer, scores), layer in zip(decoder.scores.items(), lists.held, strict=True):
            paid = torch.tensor([[sum(t["paid"]) for t in one] for one in layer])
            assert torch.allclose(
                scores[0, :, 0, : decoder.filled_of(buffer)[0]].double(), paid.double(), atol=1e-5
            )


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)), cuts=CUTS, rows=st.lists(TEXTS, min_size=1, max_size=3),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)  # fmt: skip
def test_whatever_is_read_few_tokens_are_held(
    name: str,
    cuts: tuple[int | tuple[int, int], int],
    rows: list[list[int]],
    pieces: list[int],
    grouped: tuple[Grouped, Program],
) -> None:
    """Held: unique, ascending, read before, sinks and newest in, few; and a row is what it is alone, read in any pieces."""
    policy = policy_of(name, cuts)
    single = policy.policies if isinstance(policy, ByLayer) else (policy,) * LAYERS
    budgets = [one.budget for one in single]
    decoder = BoundedDecoder(grouped[1], len(rows), PLACES, policy)
    done, turn = 0, 0
    last: list[Any] = [None] * len(rows)
    while any(len(row) > done for row in rows):
        step = pieces[turn % len(pieces)]
        for number, found in enumerate(decoder.prefill([row[done : done + step] for row in rows])):
            last[number] = found.get("logits", last[number])
        done, turn = done + step, turn + 1
        for number, row in enumerate(rows):
            read = min(done, len(row))
            assert decoder.lengths[number] == read
            promised = {*range(min(policy.sinks, read)), *range(read - decoder.since[number], read)}
            if decoder.since[number] == 0:
                recent = min(getattr(one, "recent", getattr(one, "window", 0)) for one in single)
                promised |= {*range(max(read - recent, 0), read)}
            for positions in (one for layer in the_same_tokens(decoder, number) for one in layer):
                assert positions == sorted(set(positions))
                assert promised <= set(positions) <= set(range(read))
            for layer, held in decoder.held.items():
                used = decoder.filled_of(layer)[number]
                assert (held[number, :, used:] == -1).all()
                assert used <= budgets[number_of(layer)] + decoder.since[number]
    assert decoder.peak <= max(budgets) + policy.block + len(getattr(single[0], "probe", ()))
    sizes = {layer: decoder.buffers[layer].shape[2] for layer in decoder.held}
    words = len(getattr(single[0], "probe", ()))
    assert all(size <= budgets[number_of(layer)] + policy.block + words + 1 for layer, size in sizes.items())
    for number, row in enumerate(rows):
        alone = BoundedDecoder(grouped[1], 1, PLACES, policy)
        found = alone.prefill([row])[0]["logits"]
        assert torch.allclose(found, last[number], atol=1e-9)
        assert the_same_tokens(alone, 0) == the_same_tokens(decoder, number)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)), block=st.integers(1, 9), rows=st.lists(TEXTS, min_size=1, max_size=3)
)  # fmt: skip
def test_nothing_is_lost_within_the_budget(
    name: str, block: int, rows: list[list[int]], grouped: tuple[Grouped, Program]
) -> None:
    """Text and logits are those of whole caches."""
    program = grouped[1]
    policy = POLICIES[name](40 + 12, block)
    texts = [
        graphopt.generate(program, rows, max_new_tokens=12, cache=cache).tolist()
        for cache in (policy, "full")
    ]
    assert texts[0] == texts[1]
    bounded, whole = (
        BoundedDecoder(program, len(rows), PLACES, policy), CachedDecoder(program, len(rows), PLACES),
    )  # fmt: skip
    for mine, other in zip(bounded.prefill(rows), whole.prefill(rows), strict=True):
        assert torch.allclose(mine["logits"], other["logits"], atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)), cuts=CUTS, seed=st.integers(0, 999),
    rows=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=25), min_size=1, max_size=3),
)  # fmt: skip
def test_the_text_with_candidates_is_the_text_without(
    name: str,
    cuts: tuple[int | tuple[int, int], int],
    seed: int,
    rows: list[list[int]],
    grouped: tuple[Grouped, Program],
) -> None:
    """Random trees commit several tokens at once; wrong if a rejected one counted, or a cut came at another time."""
    program = grouped[1]
    policy = policy_of(name, cuts)
    plain = graphopt.stream(program, rows, max_new_tokens=20, cache=policy)
    for _ in plain:
        pass
    found = graphopt.stream(
        program, rows, max_new_tokens=20, cache=policy, strategy=Adversary(seed, plain.rows, 0.8)
    )
    for _ in found:
        pass
    assert found.rows == plain.rows


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + counts.log()[:, None], -1) @ v


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1 << 16), slots=st.integers(9, 40), fewer=st.integers(1, 20), chunk=st.integers(2, 9),
    kinds=st.integers(1, 3),
)  # fmt: skip
def test_equal_tokens_are_merged_without_loss(
    seed: int, slots: int, fewer: int, chunk: int, kinds: int
) -> None:
    """While there are equal ones to merge; counts always sum to the tokens read, and the newest are as they were."""
    generator = torch.Generator().manual_seed(seed)
    policy = Merge(max(slots - fewer, 7), 4, sinks=2, recent=2, chunk=chunk)
    positions = torch.arange(slots).expand(2, -1)
    kind = torch.randint(0, kinds, (slots,), generator=generator)
    k, v = (torch.randn(2, kinds, 4, generator=generator, dtype=torch.float64)[:, kind] for _ in range(2))
    counts = torch.ones(2, slots, dtype=torch.float64)
    held, merged_k, merged_v, merged = policy.merged(positions, k, v, counts)
    assert merged.sum(1).tolist() == [slots, slots] and held.shape[1] == min(policy.budget, slots)
    assert all(row == sorted(set(row)) for row in held.tolist()) and held[:, :2].tolist() == [[0, 1]] * 2
    assert torch.equal(merged_k[:, -2:], k[:, -2:]) and torch.equal(merged_v[:, -2:], v[:, -2:])
    if kinds == 1:
        q = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        before, after = attended(q, k, v, counts), attended(q, merged_k, merged_v, merged)
        assert torch.allclose(before, after, atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 16), slots=st.integers(6, 30), chunk=st.integers(2, 9))
def test_merging_is_that_of_lists(seed: int, slots: int, chunk: int) -> None:
    """A round beside a loop over tokens: every other one joins the most similar of its chunk, the most similar first."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, slots, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    counts = torch.randint(1, 4, (1, slots), generator=generator).double()
    size = min(chunk, slots - 2)
    pairs = []
    for i in range(1, slots - 1):
        first = 1 + (i - 1) // size * size
        others = list(range(first + 1, min(first + size, slots - 1), 2))
        if (i - first) % 2 == 0 and others:
            alike = {j: float(torch.cosine_similarity(k[0, i], k[0, j], dim=0)) for j in others}
            best = max(others, key=lambda j: alike[j])
            pairs.append((alike[best], i, best))
    fewer = max(1, len(pairs) // 2)
    policy = Merge(slots - fewer, 4, sinks=1, recent=1, chunk=chunk)
    expected = {i: [i] for i in range(slots)}
    for _, i, j in sorted(pairs, reverse=True)[:fewer]:
        expected[j] = expected[j] + expected.pop(i)
    groups = sorted(expected.values(), key=max)
    held, merged_k, merged_v, merged = policy.merged(torch.arange(slots)[None], k, v, counts)
    assert held[0].tolist() == [max(group) for group in groups]
    for place, group in enumerate(groups):
        weight = counts[0, group]
        assert float(merged[0, place]) == float(weight.sum())
        for entries, found in ((k, merged_k), (v, merged_v)):
            mean = (entries[0, group] * weight[:, None]).sum(0) / weight.sum()
            assert torch.allclose(found[0, place], mean, atol=1e-12)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_was_dropped_is_never_read(name: str, grouped: tuple[Grouped, Program]) -> None:
    policy = POLICIES[name](8, 4)
    decoder = BoundedDecoder(grouped[1], 1, PLACES, policy)
    plain = BoundedDecoder(grouped[1], 1, PLACES, policy)
    text = [int(t) for t in torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))]
    for first in range(0, 50, 5):
        for buffer in decoder.buffers.values():
            buffer[:, :, decoder.filled[0] :] = math.nan
        found, same = (d.prefill([text[first : first + 5]])[0]["logits"] for d in (decoder, plain))
        assert torch.equal(found, same)


def test_words_of_an_episode_leave_no_trace(grouped: tuple[Grouped, Program]) -> None:
    """Two rows of which one is cut: the other holds what it held, and nothing of the words."""
    policy = Episode(8, 4, sinks=1, probe=(3, 1, 2, 6, 0))
    decoder = BoundedDecoder(grouped[1], 2, PLACES, policy)
    rows = [[1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [5, 4, 3, 2, 1]]
    decoder.prefill(rows)
    before = {name: buffer[1].clone() for name, buffer in decoder.buffers.items()}
    held = the_same_tokens(decoder, 1)
    decoder.prefill([[5], []])
    assert decoder.filled == [8, 5]
    assert decoder.lengths == [12, 5]
    assert decoder.peak == 12 + 5
    assert the_same_tokens(decoder, 1) == held
    for name, buffer in decoder.buffers.items():
        assert torch.equal(buffer[1, :, :5], before[name][:, :5])
    # the share of attention that a word pays among the tokens held, the largest one of all words and heads of a group
    module = grouped[0]
    decoder = BoundedDecoder(grouped[1], 1, PLACES, policy)
    decoder.prefill([rows[0]])
    lists = Lists(module, Window(90, 90))
    with torch.no_grad():
        for token in [*rows[0], 5, *policy.probe]:
            lists.read(token)
        x = module.embed(torch.tensor([[*rows[0], 5, *policy.probe]])) + module.places(torch.arange(17))
        q, k, _ = module.projected(0, x)
        shares = torch.softmax((q.view(1, GROUPS, -1, 17, SIZE) @ k[:, :, None].mT)[..., 12:, :12] / 2, -1)
    best = shares.amax((2, 3))[0]
    best[:, 0] = math.inf
    expected = best.topk(8).indices.sort(-1).values.tolist()
    decoder.prefill([[5]])
    assert the_same_tokens(decoder, 0)[0] == expected


@pytest.mark.parametrize("budget", [8, (10, 6)])
def test_an_episode_can_be_about_other_words(
    budget: int | tuple[int, int], grouped: tuple[Grouped, Program]
) -> None:
    """What is held is what a decoder holds that looked for these words from the start."""
    text = [(t * t + 3 * t) % VOCABULARY for t in range(40)]
    found = {}
    for words in ((1, 4, 2), (6, 0, 5)):
        budgets = budget if isinstance(budget, tuple) else (budget, budget)
        decoder = BoundedDecoder(grouped[1], 1, PLACES, policy_of("episode", (budget, 4)))
        fresh = BoundedDecoder(
            grouped[1],
            1,
            PLACES,
            ByLayer([Episode(one, 4, sinks=2, probe=words, recent=2) for one in budgets]),
        )
        decoder.look_for(words)
        for one in (decoder, fresh):
            one.prefill([text])
        found[words] = the_same_tokens(decoder, 0)
        assert found[words] == the_same_tokens(fresh, 0)
        assert [[len(held) for held in layer] for layer in found[words]] == [[n] * GROUPS for n in budgets]
    assert len({str(held) for held in found.values()}) == 2
    with pytest.raises(UsageError, match="4 words are more than the 3"):
        decoder.look_for([1, 2, 3, 4])
    with pytest.raises(UsageError, match="window looks for no words"):
        BoundedDecoder(grouped[1], 1, PLACES, Window(8, 4)).look_for([1])


def test_budgets_of_other_layers_than_there_are(grouped: tuple[Grouped, Program]) -> None:
    with pytest.raises(UsageError, match="there are budgets for 3 layers, the program has caches in 2"):
        graphopt.generate(grouped[1], [[1]], max_new_tokens=2, cache="window{budget=[8 9 10]}")
    with pytest.raises(UsageError, match="layer 1 has another block than layer 0"):
        ByLayer([Window(8, 4), Window(8, 5)])
    with pytest.raises(UsageError, match="a budget of 3 tokens leaves nothing"):
        as_policy("window{budget=[8 3]}")
    with pytest.raises(UsageError, match="layer 0 has .*: budgets by layer are of policies that drop tokens"):
        ByLayer([Select(16), Select(16)])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=f"probe has token {VOCABULARY}"):
        BoundedDecoder(grouped[1], 1, PLACES, Episode(8, 4, sinks=1, probe=(1, VOCABULARY)))
    # other options than budgets are those of each layer
    text = [(t * t + 3 * t) % VOCABULARY for t in range(40)]
    held = []
    for policies in (
        (Random(8, 4, seed=1), Random(8, 4, seed=2)),
        (Random(8, 4, seed=1),) * 2,
        (Random(8, 4, seed=2),) * 2,
    ):
        decoder = BoundedDecoder(grouped[1], 1, PLACES, ByLayer(policies))
        decoder.prefill([text])
        held.append(the_same_tokens(decoder, 0))
    assert held[0] == [held[1][0], held[2][1]]
    assert held[1][1] != held[2][1]
    found = as_policy("heavy-hitters{budget=[8 16]}")
    assert isinstance(found, ByLayer)
    assert [one.recent for one in found.policies if isinstance(one, HeavyHitters)] == [4, 8]


def test_words_stand_within_the_positions_of_the_model(grouped: tuple[Grouped, Program]) -> None:
    """A cut right before the last position: wrong if the words looked up positions that the model does not have."""
    policy = Episode(8, 4, sinks=1, probe=(3, 1, 2, 6, 0))
    decoder = BoundedDecoder(grouped[1], 1, PLACES, policy)
    decoder.prefill([[t % VOCABULARY for t in range(PLACES)]])
    assert decoder.filled == [8]


def test_drafts_by_the_first_layers_neither_cut_nor_count(captured: Callable[[str], Program]) -> None:
    """Rows with different room; wrong if drafting cut a row, or attention of drafts was added to scores."""
    program = graphopt.optimize(captured("llama"), "insert-cache{tree=true}, attach-early-exit{layers=[0]}")
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
    for policy in (HeavyHitters(8, 5, sinks=1), Window(8, 3, sinks=1), Observed(8, 4, 1, window=3)):
        texts = [
            graphopt.generate(
                program, rows, max_new_tokens=24, cache=policy, strategy=strategy, eos_token_id=None
            ).tolist()
            for strategy in (None, "early-exit{tokens=3}")
        ]
        assert texts[0] == texts[1], policy.name


def test_longer_rows_go_on_where_shorter_ones_have_ended(grouped: tuple[Grouped, Program]) -> None:
    """Wrong if slots ran out: a row full to the brim is padded by as many tokens as another one reads."""
    policy = Window(6, 5, sinks=1)
    decoder = BoundedDecoder(grouped[1], 2, PLACES, policy)
    rows = [[1] * 14, [2] * 31]
    found = decoder.prefill(rows)
    assert decoder.peak <= 11
    for row, one in zip(rows, found, strict=True):
        alone = BoundedDecoder(grouped[1], 1, PLACES, policy).prefill([row])[0]["logits"]
        assert torch.allclose(one["logits"], alone, atol=1e-12)


@pytest.mark.parametrize("budget", [8, (10, 6)])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_snapshots_come_back(
    name: str, budget: int | tuple[int, int], grouped: tuple[Grouped, Program]
) -> None:
    policy = policy_of(name, (budget, 4))
    decoder = BoundedDecoder(grouped[1], 1, PLACES, policy)
    decoder.prefill([[1, 2, 3, 4, 5, 6] * 3])
    kept, held = decoder.snapshot(), the_same_tokens(decoder, 0)
    expected = decoder.prefill([[3, 2, 1, 0, 5]])[0]["logits"]
    decoder.restore(None)
    assert decoder.lengths == [0]
    other = decoder.prefill([[6, 6, 5] * 9])[0]["logits"]
    fresh = BoundedDecoder(grouped[1], 1, PLACES, policy)
    assert torch.equal(other, fresh.prefill([[6, 6, 5] * 9])[0]["logits"])
    decoder.restore(kept)
    assert the_same_tokens(decoder, 0) == held
    assert torch.equal(decoder.prefill([[3, 2, 1, 0, 5]])[0]["logits"], expected)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("gemma3", "heavy-hitters"),
        ("gemma3", "observed"),
        ("falcon_h1", "episode"),
        ("falcon_h1", "heavy-hitters"),
        ("gpt_oss", "heavy-hitters"),
        ("deepseek_v3", "window"),
    ],
)
def test_windows_states_and_shared_heads(
    model: str, policy: str, captured: Callable[[str], Program], falcon_h1: Program
) -> None:
    """Layers that see a window, attention with sinks of its own, states beside attention: budget beyond the text is no change."""
    program = falcon_h1 if model == "falcon_h1" else captured(model)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]
    large, small = POLICIES[policy](40, 4), POLICIES[policy](9, 4)
    texts = [
        graphopt.generate(program, rows, max_new_tokens=20, cache=cache, eos_token_id=None).tolist()
        for cache in ("full", large, small)
    ]
    assert texts[1] == texts[0]
    assert len(texts[2][0]) == len(texts[0][0])
    cached = with_cache(program)
    text = list(range(5, 45))
    found = []
    for cuts in ((text,), (text[:7], text[7:18], text[18:])):
        decoder = BoundedDecoder(cached, 1, 60, small)
        logits = [decoder.prefill([piece])[0]["logits"] for piece in cuts][-1]
        found.append(logits)
        assert decoder.filled == [min(small.budget, 40)]
    assert torch.allclose(found[0], found[1], atol=1e-4)
    for layer in the_same_tokens(decoder, 0):
        for positions in layer:
            assert positions == sorted(set(positions))


def test_layers_that_see_a_window_drop_what_they_never_see_again() -> None:
    """Of three tokens that a layer does not see any more none stays before one that it sees."""
    positions = torch.arange(8).view(1, 1, 8)
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4]).view(1, 1, 1, 8)
    keys = torch.ones(1, 1, 8, 2)
    policy = HeavyHitters(5, 4, sinks=1, recent=1)
    assert policy.kept(Held(positions, keys, scores)).tolist() == [[[0, 1, 2, 3, 7]]]
    assert policy.kept(Held(positions, keys, scores, 5)).tolist() == [[[0, 4, 5, 6, 7]]]
    assert policy.kept(Held(positions, keys, scores, 3)).tolist() == [[[0, 4, 5, 6, 7]]]


def test_a_window_of_the_policy_is_enough_for_a_window_of_the_layer(
    captured: Callable[[str], Program],
) -> None:
    """Mistral sees 5 tokens in every layer, so that a cache of few is exact for texts of any length."""
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]
    for cache in ("window{budget=6 block=3 sinks=0}", "random{budget=7 block=3 sinks=0 recent=0}"):
        texts = [
            graphopt.generate(
                captured("mistral"), rows, max_new_tokens=40, cache=c, eos_token_id=None
            ).tolist()
            for c in ("full", cache)
        ]
        assert texts[0] == texts[1]


def test_names_and_options() -> None:
    assert as_policy("full") is None
    policy = as_policy("observed{budget=40 block=8 window=16 pool=1}")
    assert isinstance(policy, Observed)
    assert (policy.budget, policy.block, policy.sinks, policy.window, policy.pool) == (40, 8, 4, 16, 1)
    for text, message in (
        ("windw{budget=9}", "did you mean 'window'"),
        ("window", "window needs a budget"),
        ("window{budget=9 size=3}", "window has no option 'size'"),
        ("window{budget=4}", "leaves nothing beside 4 sinks"),
        ("window{budget=9 block=0}", "block is 0"),
        ("window{budget=9.5}", "budget is 9.5"),
        ("window{budget=9}, full", "names 2 policies"),
        ("full{budget=9}", "has no options"),
        ("random{budget=9 seed=x}", "seed is 'x'"),
        ("heavy-hitters{budget=9 recent=6}", "6 newest tokens and 4 sinks do not fit"),
        ("key-norm{budget=9 recent=x}", "recent is 'x'"),
        ("observed{budget=9}", "do not fit into the budget of 9"),
        ("observed{budget=40 pool=4}", "an odd number"),
        ("observed{budget=40 window=2.5}", "window is 2.5"),
        ("episode{budget=9}", "the episode has no words"),
        ("episode{budget=9 probe=3}", "the episode has no words"),
        ("window{budget=", "pipeline"),
    ):
        with pytest.raises(GraphoptError, match=message):
            as_policy(text)
    with pytest.raises(UsageError, match="a token of probe is 1.5"):
        Episode(9, probe=(1, 1.5))  # type: ignore[arg-type]


def test_programs_whose_caches_cannot_be_bounded(
    captured: Callable[[str], Program], mamba: Program, grouped: tuple[Grouped, Program]
) -> None:
    cache = "window{budget=8 block=4}"
    for model in ("bloom", "mpt"):
        with pytest.raises(UsageError, match="adds a bias that depends on where tokens stand"):
            graphopt.generate(captured(model), [[5, 6]], max_new_tokens=2, cache=cache)
    with pytest.raises(UsageError, match="adds a bias that depends on where tokens stand"):
        graphopt.generate(captured("t5"), torch.tensor([[5, 6]]), max_new_tokens=2, cache=cache)
    with pytest.raises(UsageError, match="no caches that grow"):
        graphopt.generate(mamba, [[5, 6]], max_new_tokens=2, cache=cache)
    few = graphopt.optimize(captured("llama"), "insert-cache, quantize-cache{bits=8}")
    with pytest.raises(UsageError, match="caches in few bits are not bounded"):
        graphopt.generate(few, [[5, 6]], max_new_tokens=2, cache=cache)
    with pytest.raises(UsageError, match="the model has positions for 64"):
        graphopt.generate(captured("llama"), [[5] * 60], max_new_tokens=5, cache=cache)
    # a text as long as the model has positions for is written
    full: Sequence[Any] = graphopt.generate(
        captured("llama"), [[5] * 60], max_new_tokens=4, cache=cache, eos_token_id=None
    )
    assert full.shape == (1, 64)  # type: ignore[attr-defined]
    with pytest.raises(PassRefusedError):
        graphopt.generate(captured("bert"), [[5, 6]], max_new_tokens=2, cache=cache)
