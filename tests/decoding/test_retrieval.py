"""Candidates from texts: the counts are those of the texts, and trees are the likeliest continuations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.decoding import Retrieval
from graphopt.decoding.followers import Counted, Counting, likely
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=4)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, order=st.integers(1, 4))
def test_counts_are_those_of_the_texts(texts: list[list[int]], order: int) -> None:
    """Wrong if a run crossed the border of two texts, or the arrays told other counts than counting does."""
    counted, counting = Counted(texts, order, kept=9), Counting(order)
    expected: dict[tuple[int, ...], Counter[int]] = {}
    for text in texts:
        counting.add(text, 0)
        for place in range(1, len(text)):
            for length in range(1, min(order, place) + 1):
                expected.setdefault(tuple(text[place - length : place]), Counter())[text[place]] += 1
    for run, followers in expected.items():
        assert counted.after(run) == followers
        assert counting.after(run) == followers
    for run in [(0,), (1, 2), (5, 5, 5), (99,)]:
        assert counted.after(run[:order]) == expected.get(run[:order], {})


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, run=st.lists(st.integers(0, 5), max_size=6))
def test_what_is_likely_is_a_distribution_or_less(texts: list[list[int]], run: list[int]) -> None:
    found = likely(run, [(Counted(texts, 4), 1.0)], 4)
    assert sum(found.values()) <= 1 + 1e-9
    assert all(share > 0 for share in found.values())
    seen = {t for text in texts for t in text[1:]}
    assert set(found) <= seen


class Known:
    """Of a decoder, what a retrieval reads."""

    embedded = vocabulary = 50


def tree(drafter: Retrieval, row: list[int], room: int = 9) -> set[tuple[int, ...]]:
    draft = drafter.propose_row(0, row, room)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths), "a candidate stands there twice"
    return set(paths)


def test_trees_hold_what_followed_most_often() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 9], [7, 2, 8]]
    drafter = Retrieval(texts, nodes=3)
    drafter.begin(Known(), [[40]], None)  # type: ignore[arg-type]
    assert tree(drafter, [1, 2]) == {(3,), (3, 4), (3, 9)}
    assert (8,) in tree(drafter, [7, 2]), "the longer run counts before the shorter"
    assert tree(drafter, [1, 2], room=1) <= {(3,), (8,), (4,)}
    assert tree(drafter, [44]) == set()
    first = drafter.propose_row(0, [1, 2], 9)
    assert first.tokens[:2] == [3, 4], "the likeliest path does not come first"


def test_what_is_written_is_counted_and_more_than_old_texts(captured: Callable[[str], Program]) -> None:
    drafter = Retrieval([[1, 2, 3]] * 4, nodes=1)
    drafter.begin(Known(), [[9, 1, 2, 5]], None)  # type: ignore[arg-type]
    assert tree(drafter, [9, 1, 2]) == {(5,)}
    program = captured("llama")
    row = [[5, 3, 5, 3, 5, 3, 5]]
    again = Retrieval()
    plain = graphopt.generate(program, row, max_new_tokens=24, eos_token_id=None)
    for _ in range(2):
        stream = graphopt.stream(program, row, max_new_tokens=24, eos_token_id=None, strategy=again)
        for _ in stream:
            pass
        assert stream.rows == plain.tolist()
    assert stream.statistics.steps < 8, "the same text a second time is not proposed"


def test_texts_are_files_on_the_command_line(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured("llama")
    with pytest.raises(UsageError, match="nodes and order must be at least 1"):
        Retrieval(nodes=0)
    with pytest.raises(UsageError, match="does not exist"):
        graphopt.generate(
            program, [[5]], max_new_tokens=2, strategy=f"retrieval{{texts={tmp_path / 'no.jsonl'}}}"
        )
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(UsageError, match="read from .jsonl"):
        graphopt.generate(
            program, [[5]], max_new_tokens=2, strategy=f"retrieval{{texts={tmp_path / 'a.npz'}}}"
        )
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    with pytest.raises(UsageError, match="no tokenizer"):
        graphopt.generate(
            program, [[5]], max_new_tokens=2, strategy=f"retrieval{{texts={tmp_path / 't.jsonl'}}}"
        )
