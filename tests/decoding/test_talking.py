"""Conversations that go on: what was said is read once, and within a budget as much of it is kept as fits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conversations import speaker  # a fixture

import graphopt
from graphopt.data.tokenizer import Tokenizer
from graphopt.decoding.episodes import TokenMeans, clustered, nearest, segments_of
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program

__all__ = ["speaker"]

SAID = ("hi", "so", "why", "no")


def talked(program: Program, **options: Any) -> tuple[list[str], graphopt.Conversation]:
    """Return the answers to what is said, and the conversation."""
    conversation = graphopt.Conversation(program, system="be", **options)
    return [conversation.say(text, max_new_tokens=3) for text in SAID], conversation


def answers_by_whole_texts(program: Program) -> tuple[list[str], list[int]]:
    """Return the answers when every one of them follows all of the text, read again, and the last text."""
    tokenizer = Tokenizer(program)
    messages = [{"role": "system", "content": "be"}]
    answers, whole = [], []
    for text in SAID:
        messages.append({"role": "user", "content": text})
        ids, _ = tokenizer.encode_chat(tokenizer.chat(messages, answering=True))
        whole = graphopt.generate(program, [ids], max_new_tokens=3)[0].tolist()
        answers.append(tokenizer.decode([t for t in whole[len(ids) :] if t != 2]))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers, whole


def test_answers_are_those_to_the_whole_text(speaker: Program) -> None:
    """Whole caches, and every policy with a budget that is never reached."""
    expected, whole = answers_by_whole_texts(speaker)
    for cache in ("full", "window{budget=200 block=7}", "heavy-hitters{budget=200 block=50}"):
        found, conversation = talked(speaker, cache=cache)
        assert found == expected, cache
        # the last token of an answer is read with what follows it
        assert conversation.tokens == whole[: len(conversation.tokens)]
        assert len(conversation.tokens) in (len(whole) - 1, len(whole))
        assert [m["role"] for m in conversation.messages] == ["system", *["user", "assistant"] * 4]
        assert [m["content"] for m in conversation.messages[2::2]] == expected


@pytest.mark.parametrize("cache", ["full", "window{budget=200 block=7}"])
def test_answers_that_are_written_in_another_way_are_read_again(speaker: Program, cache: str) -> None:
    """A template that changes an answer; wrong if caches went on from the tokens that were generated."""
    conversation = graphopt.Conversation(speaker, cache=cache)
    conversation.say("who are you", max_new_tokens=3)
    conversation.messages[-1]["content"] = "a small model"
    found = conversation.say("how small", max_new_tokens=3)
    tokenizer = Tokenizer(speaker)
    ids, _ = tokenizer.encode_chat(tokenizer.chat(conversation.messages[:-1], answering=True))
    whole = graphopt.generate(speaker, [ids], max_new_tokens=3)[0].tolist()
    assert found == tokenizer.decode([t for t in whole[len(ids) :] if t != 2])
    assert conversation.tokens == whole[: len(conversation.tokens)]


def test_caches_stay_small_and_hold_what_generate_would(speaker: Program) -> None:
    """Wrong if a message were read twice, or cuts fell elsewhere than in one text."""
    found, conversation = talked(speaker, cache="window{budget=16 block=6}")
    decoder: Any = conversation._decoder
    assert decoder.peak <= 22
    assert conversation.slots == 23
    tokenizer = Tokenizer(speaker)
    ids, _ = tokenizer.encode_chat(tokenizer.chat(conversation.messages[:-1], answering=True))
    whole = graphopt.generate(speaker, [ids], max_new_tokens=3, cache="window{budget=16 block=6}")[0].tolist()
    assert found[-1] == tokenizer.decode([t for t in whole[len(ids) :] if t != 2])


def test_what_goes_wrong_leaves_the_conversation_as_it_was(speaker: Program) -> None:
    limit = speaker.origin.config["max_position_embeddings"]
    for options in (
        {},
        {"cache": "window{budget=16 block=6}"},
        {"cache": "window{budget=16}", "episodes": 2},
    ):
        conversation = graphopt.Conversation(speaker, **options)
        conversation.say("who are you", max_new_tokens=3)
        before = [dict(m) for m in conversation.messages]
        with pytest.raises(UsageError, match=f"tokens, there are positions for {limit}"):
            conversation.say("a" * limit, max_new_tokens=3)
        with pytest.raises(UsageError, match="positions for"):
            conversation.add("user", "a" * limit)
        with pytest.raises(UsageError, match="max_new_tokens"):
            conversation.say("why", max_new_tokens=0)
        with pytest.raises(UsageError, match="temperature"):
            conversation.say("why", temperature=-1)
        assert conversation.messages == before
        fresh = graphopt.Conversation(speaker, **options)
        fresh.say("who are you", max_new_tokens=3)
        assert conversation.say("why", max_new_tokens=3) == fresh.say("why", max_new_tokens=3)
    conversation = graphopt.Conversation(speaker, length=30)
    assert conversation.slots == 30
    with pytest.raises(UsageError, match="there are positions for 30"):
        conversation.say("a" * 25, max_new_tokens=3)


def test_an_interruption_while_an_answer_is_written(
    speaker: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if caches went on behind half of an answer that nobody has."""
    from graphopt.decoding.bounded import BoundedDecoder

    cache = "window{budget=16 block=6}"
    expected = talked(speaker, cache=cache)[0]
    conversation = graphopt.Conversation(speaker, cache=cache, system="be")
    found = [conversation.say(SAID[0], max_new_tokens=3)]
    accept, calls = BoundedDecoder.accept, []

    def interrupted(self: BoundedDecoder, paths: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        accept(self, paths)

    monkeypatch.setattr(BoundedDecoder, "accept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.say("never mind", max_new_tokens=3)
    monkeypatch.undo()
    found += [conversation.say(text, max_new_tokens=3) for text in SAID[1:]]
    assert found == expected


def test_options_of_a_conversation(speaker: Program) -> None:
    for options, message in (
        ({"episodes": 2}, "episodes need a budget"),
        ({"episodes": -1}, "episodes is -1"),
        ({"segment": 0}, "segment is 0"),
        ({"medoids": "x"}, "medoids is 'x'"),
        ({"length": 0}, "length is 0"),
        ({"length": 1 << 20}, "the model has positions for"),
        ({"cache": "windw{budget=9}"}, "did you mean 'window'"),
        ({"cache": "episode{budget=9}"}, "the episode has no words"),
    ):
        with pytest.raises(UsageError, match=message):
            graphopt.Conversation(speaker, **options)


TOPICS = (range(10, 18), range(18, 26), range(26, 34))


def test_questions_find_their_episode() -> None:
    """Segments about three topics in turn, each with words of its own and some that all have."""
    chance = random.Random(0)
    embed = TokenMeans.__new__(TokenMeans)
    embed.table = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    messages = [
        [chance.choice(TOPICS[n % 12 // 4]) for _ in range(6)] + [chance.randrange(10) for _ in range(6)]
        for n in range(48)
    ]
    segments = segments_of(messages, 4)
    assert [len(s) for s in segments] == [48] * 12
    embed.count(segments)
    found = clustered(segments, embed, 3, 2, seed=1)
    assert sorted(i for e in found for i in e.segments) == list(range(12))
    assert {e.segments for e in found} == {(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)}
    for topic, words in enumerate(TOPICS):
        episode = found[nearest(found, embed([[*words[:5], 2]])[0])]
        assert episode.segments[0] == topic
        assert len(episode.words) == 96
    assert len(clustered(segments[:2], embed, 5, 2, seed=1)) <= 2


def test_episodes_answer_as_whole_caches_do_while_all_fits(speaker: Program) -> None:
    """Each episode reads the whole conversation, so that a budget that is never reached changes nothing."""
    expected, _ = answers_by_whole_texts(speaker)
    found, conversation = talked(
        speaker, cache="window{budget=200 block=16}", episodes=2, segment=2, medoids=1
    )
    assert found == expected
    small, conversation = talked(speaker, cache="window{budget=16 block=6}", episodes=2, segment=2, medoids=1)
    decoder: Any = conversation._decoder
    assert decoder.peak <= 16 + 6 + 6
    assert len(small) == 4


def test_commands_that_talk(speaker: Program, told: Callable[..., Any], tmp_path: Path) -> None:
    """The prompt as a user's message, and caches of bounded size, are what Python gives."""
    place = tmp_path / "speaker"
    speaker.save(place)
    tokenizer = Tokenizer(speaker)
    asked, _ = tokenizer.encode_chat(
        tokenizer.chat([{"role": "user", "content": "who are you"}], answering=True)
    )
    cache = "window{budget=6 block=2}"
    found = [
        told("generate", place, "--prompt", "who are you", "--max-new-tokens", 12, *options)["tokens"]
        for options in ([], ["--chat"], ["--chat", "--cache", cache])
    ]
    for tokens, ids, options in zip(
        found, (tokenizer.encode("who are you"), asked, asked), ({}, {}, {"cache": cache}), strict=True
    ):
        assert (
            tokens == graphopt.generate(speaker, [ids], max_new_tokens=12, **options)[0, len(ids) :].tolist()
        )
    wrong = told("generate", place, "--prompt", "a", "--cache", "windw{budget=9}", status=2)
    assert "did you mean 'window'" in wrong["message"]
    bare = speaker.copy()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        bare.origin.assets.pop(name, None)
    bare.save(tmp_path / "bare")
    wrong = told("generate", tmp_path / "bare", "--prompt", "a", "--chat", status=2)
    assert "has no chat template" in wrong["message"]
