"""Heads that know fewer tokens: what proposes is trimmed, what decides is not, and numbers of tokens stay the tokenizer's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import PassRefusedError, Program
from graphopt.decoding.drafters import DraftProgram
from graphopt.ir.errors import LoweringError, UsageError
from graphopt.ir.facts import ExportBlockers, Vocabulary
from graphopt.ir.vocabulary import kept_tokens, over_all_tokens

SIZE, ROWS = 101, [[5, 9, 33], [7, 8]]
ATTACH = {
    "draft_logits": ("attach-draft", "attached-draft"),
    "multi_token_logits": ("attach-multi-token-heads{heads=2}", "multi-token-heads"),
    "exit_logits": ("attach-early-exit{layers=[0]}", "early-exit"),
}


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@lru_cache
def model(tied: bool = False) -> Program:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, tie_word_embeddings=tied,
    )  # fmt: skip
    return graphopt.capture(LlamaForCausalLM(config).eval(), {"input_ids": ids(2, 6)})


@lru_cache
def written() -> torch.Tensor:
    return graphopt.generate(model(), ROWS, max_new_tokens=14, eos_token_id=None)


@lru_cache
def attached(output: str, keep: int = 40) -> Program:
    return graphopt.optimize(
        model(), f"{ATTACH[output][0]}, trim-vocabulary{{keep={keep}}}", data=[{"input_ids": written()}]
    )


@pytest.mark.parametrize("output", ATTACH)
@pytest.mark.parametrize("keep", [12, 40])
def test_what_proposes_is_trimmed_and_the_text_stays(output: str, keep: int) -> None:
    """Wrong if the head that decides were trimmed, or places in a draft's table were taken for tokens."""
    done = attached(output, keep)
    tokens = kept_tokens(done, output)
    assert tokens is not None
    assert len(tokens) == keep
    whole = graphopt.optimize(model(), ATTACH[output][0])(input_ids=ids(2, 6))
    found = done(input_ids=ids(2, 6))
    assert torch.equal(found["logits"], whole["logits"])
    assert torch.allclose(found[output], whole[output][..., tokens], atol=1e-6)
    strategy = ATTACH[output][1]
    stream = graphopt.stream(done, ROWS, max_new_tokens=14, eos_token_id=None, strategy=strategy)
    before = graphopt.stream(
        graphopt.optimize(model(), ATTACH[output][0]),
        ROWS,
        max_new_tokens=14,
        eos_token_id=None,
        strategy=strategy,
    )
    for each in (stream, before):
        list(each)
        assert not each.statistics.notes, "decoding went on without candidates"
    assert stream.rows == before.rows
    assert sum(stream.statistics.proposed) > 0
    if keep == 40:
        # every token of the text is known, so that where the draft was right it still is
        assert sum(stream.statistics.accepted) >= sum(before.statistics.accepted)


@pytest.mark.parametrize("output", ATTACH)
def test_a_trimmed_head_is_stored_with_its_rows_alone(output: str, tmp_path: Path) -> None:
    """Wrong if the whole matrix were kept, and rows taken of it at run time."""
    done = attached(output)
    heads = 2 if output == "multi_token_logits" else 1
    own = [w for w in done.weights.values() if w.name.endswith(".kept")]
    assert [tuple(w.source.shape) for w in own] == [(40, 24)] * heads
    before = graphopt.optimize(model(), ATTACH[output][0])
    matrix = SIZE * 24 * 4
    had = matrix * heads if output == "multi_token_logits" else 0
    size = sum(w.bytes for w in done.weights.values()) - sum(w.bytes for w in before.weights.values())
    assert size == heads * 40 * 24 * 4 - had
    again = graphopt.load(done.save(tmp_path / "saved"))
    assert torch.equal(again(input_ids=ids(2, 6))[output], done(input_ids=ids(2, 6))[output])
    assert torch.equal(
        graphopt.generate(again, ROWS, max_new_tokens=14, eos_token_id=None, strategy=ATTACH[output][1]),
        written(),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_alone_a_program_is_a_draft_that_says_tokens(tied: bool) -> None:
    """Wrong if positions of the trimmed table came out as tokens, and went in again."""
    program = model(tied)
    done = graphopt.optimize(program, "trim-vocabulary{keep=20}", data=[{"input_ids": ids(2, 30)}])
    tokens = kept_tokens(done, "logits")
    assert tokens is not None
    assert done.report is not None
    assert any("now a draft" in note for note in done.report.passes[-1].notes)
    rows = [list(row) for row in ROWS]
    for row in rows:  # by hand: the likeliest of those that stay
        for _ in range(9):
            logits = program(input_ids=torch.tensor([row]))["logits"][0, -1]
            row.append(int(tokens[logits[tokens].argmax()]))
    found = graphopt.stream(done, ROWS, max_new_tokens=9, eos_token_id=None)
    list(found)
    assert found.rows == rows
    drawn = graphopt.generate(
        done, ROWS[1:] * 30, max_new_tokens=3, eos_token_id=None, temperature=3.0, top_k=50
    )
    assert set(drawn[:, 2:].flatten().tolist()) <= set(tokens.tolist())
    plain = graphopt.stream(program, ROWS, max_new_tokens=9, eos_token_id=None)
    drafted = graphopt.stream(
        program, ROWS, max_new_tokens=9, eos_token_id=None, strategy=DraftProgram(done, 3)
    )
    for each in (plain, drafted):
        list(each)
    assert plain.rows == drafted.rows
    assert not drafted.statistics.notes
    size = sum(w.bytes for w in done.weights.values()) - sum(w.bytes for w in program.weights.values())
    assert size == 24 * 4 * (20 if tied else 20 - SIZE), "an untied head is stored as the rows that stay"


def test_without_a_cache_tokens_are_mapped_as_well() -> None:
    """Wrong if one way of generating gave places."""
    from graphopt.decoding.plain import continuations

    done = graphopt.optimize(model(), "trim-vocabulary{keep=20}")
    row = torch.tensor(ROWS[:1])
    expected = graphopt.generate(done, row, max_new_tokens=6, eos_token_id=None)[0, 3:].tolist()
    assert list(continuations(done, row, max_new_tokens=6)) == expected


def test_keeping_all_tokens_changes_nothing() -> None:
    """Wrong if a program that lost nothing could not be written any more, or was rewritten."""
    for text in ("keep=101", "fraction=1.0"):
        done = graphopt.optimize(model(), f"trim-vocabulary{{{text}}}")
        assert done.text() == model().text()
        assert Vocabulary not in done.facts
        assert ExportBlockers not in done.facts


def test_measuring_counts_what_is_gone_as_impossible() -> None:
    """Wrong if evaluation ended in an index that is out of range, or scored places."""
    data = [{"input_ids": ids(2, 12, seed=4)}]
    done = graphopt.optimize(model(), "trim-vocabulary{keep=60}", data=[{"input_ids": ids(2, 30)}])
    tokens = kept_tokens(done, "logits")
    assert tokens is not None
    values = graphopt.evaluate(
        done, data, ["perplexity", "accuracy", "kl", "agreement"], against=model()
    ).values
    row, logits = data[0]["input_ids"], model()(**data[0])["logits"]
    outside = ~torch.isin(row[:, 1:], tokens)
    assert 0 < outside.sum() < outside.numel()
    assert values["outside_vocabulary"] == float(outside.double().mean())
    assert values["perplexity"] == float("inf")
    best = tokens[logits[..., tokens].argmax(-1)]
    assert values["accuracy"] == pytest.approx(float((best[:, :-1] == row[:, 1:]).double().mean()))
    assert values["agreement"] == pytest.approx(float((best == logits.argmax(-1)).double().mean()))
    assert values["kl"] == float("inf")
    back = graphopt.evaluate(model(), data, ["kl"], against=done).values
    log = logits.double().log_softmax(-1)
    some = logits[..., tokens].double().log_softmax(-1)
    assert back["kl"] == pytest.approx(
        float((some.exp() * (some - log[..., tokens])).sum(-1).mean()), rel=1e-6
    )
    assert "outside_vocabulary" not in back
    known = [{"input_ids": tokens[ids(2, 12, seed=5) % 60]}]
    found = graphopt.evaluate(done, known, ["perplexity"]).values
    said = model()(**known[0])["logits"][..., tokens][:, :-1].double()
    loss = F.cross_entropy(
        said.flatten(0, 1), torch.searchsorted(tokens, known[0]["input_ids"][:, 1:]).flatten()
    )
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found["outside_vocabulary"] == 0.0


def test_the_likeliest_entries_of_trimmed_heads_are_tokens() -> None:
    """Wrong if take-top-k's numbers were places; before trim-vocabulary there is nothing left to trim."""
    heads = "attach-multi-token-heads{heads=2}"
    done = graphopt.optimize(attached("multi_token_logits"), "take-top-k{k=8}")
    stream = graphopt.stream(done, ROWS, max_new_tokens=14, eos_token_id=None, strategy="multi-token-heads")
    list(stream)
    assert not stream.statistics.notes
    assert [row[-14:] for row in stream.rows] == written()[:, -14:].tolist()
    found = over_all_tokens(done, done(input_ids=ids(1, 4)))["multi_token_logits_tokens"]
    whole = over_all_tokens(
        attached("multi_token_logits"), attached("multi_token_logits")(input_ids=ids(1, 4))
    )
    assert torch.equal(found[..., 0], whole["multi_token_logits"].argmax(-1))
    with pytest.raises(PassRefusedError, match="trim-vocabulary comes before take-top-k"):
        graphopt.optimize(model(), f"{heads}, take-top-k{{k=8}}, trim-vocabulary{{keep=40}}")
    with pytest.raises(PassRefusedError, match="mask tokens propose"):
        graphopt.optimize(model(), "attach-mask-tokens{masks=1 rank=2}, trim-vocabulary{keep=40}")


@pytest.mark.parametrize("recipe", ["draft", "medusa", "medusa{targets=model}"])
def test_trimmed_heads_learn_what_they_can_say(recipe: str) -> None:
    """Wrong if tokens that a head does not have were its targets, or the wrong rows were."""
    from graphopt.training import Settings
    from graphopt.training.learning import as_method

    output = "draft_logits" if recipe == "draft" else "multi_token_logits"
    done = attached(output)
    tokens = kept_tokens(done, output)
    assert tokens is not None
    batch = {"input_ids": ids(2, 12, seed=6)}
    trained, record = graphopt.train(
        done, recipe, [batch], Settings(steps=6, learning_rate=1e-2, schedule="constant"), device="cpu"
    )
    assert record.losses[-1] < record.losses[0]
    moved = {
        w.name
        for n, w in trained.weights.items()
        if not torch.equal(w.source.load(), done.weights[n].source.load())
    }
    assert any(name.endswith(".kept") for name in moved), "the trimmed matrix does not learn"
    assert torch.equal(trained(**batch)["logits"], done(**batch)["logits"])
    if recipe == "draft":
        return
    made = as_method(recipe).recipe(done)
    found, row = done(**batch), batch["input_ids"]
    expected = 0.0
    for head in range(2):
        ahead = head + 2
        said = found[output][:, :-ahead, head].double().log_softmax(-1)
        if "model" in recipe:
            target = found["logits"][:, ahead - 1 : -1][..., tokens].double().softmax(-1)
            each = -(target * said).sum(-1)
        else:
            known = torch.isin(row[:, ahead:], tokens)
            place = torch.searchsorted(tokens, row[:, ahead:]).clamp(max=39)
            each = -said.gather(-1, place[..., None])[..., 0][known]
        expected += 0.8**head * float(each.mean())
    assert float(made.loss(made.module(), made.transform(batch))) == pytest.approx(expected, rel=1e-4)


def test_what_would_take_places_for_tokens_refuses(tmp_path: Path) -> None:
    """Wrong if another way out wrote a program that says the wrong tokens, or training ended in an index error."""
    from graphopt.backends.onnx.genai import lower_genai
    from graphopt.training import Settings

    done = graphopt.optimize(model(), "trim-vocabulary{keep=20}, insert-cache{max_length=16}")
    with pytest.raises(LoweringError, match="takes their places for tokens"):
        lower_genai(done, tmp_path / "genai")
    with pytest.raises(UsageError, match="cannot be trained on text that has other tokens"):
        graphopt.train(
            graphopt.optimize(model(), "trim-vocabulary{keep=20}"),
            "language",
            [{"input_ids": ids(1, 5)}],
            Settings(steps=1),
        )
