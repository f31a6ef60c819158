"""A draft inside of its program: outputs stay, it learns, and the text is the same whatever it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.decoding import AttachedDraft
from graphopt.ir.errors import PassRefusedError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory
from graphopt.training import Settings
from graphopt.training.recipes import Draft

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(3))


def shaken(program: Program) -> Program:
    done, generator = program.copy(), torch.Generator().manual_seed(0)
    for node, weight in program.weights.items():
        if weight.name.startswith("draft."):
            value = weight.source.load()
            done.weights[node] = replace(
                weight, source=InMemory(value + 0.2 * torch.randn(value.shape, generator=generator))
            )
    return done


@pytest.mark.parametrize("name", ["gemma2", "phi3", "mixtral", "bloom"])
def test_logits_stay_and_the_draft_sees_what_it_should(name: str, captured: Callable[[str], Program]) -> None:
    """What the draft says at t depends on features up to t and the tokens after each, and on nothing later."""
    program = captured(name)
    done = shaken(graphopt.optimize(program, "attach-draft"))
    found = done(input_ids=IDS)
    assert torch.equal(found["logits"], program(input_ids=IDS)["logits"])
    assert found["draft_logits"].shape == found["logits"].shape
    later = IDS.clone()
    later[:, 6:] = 5
    assert torch.allclose(
        done(input_ids=later)["draft_logits"][:, :5], found["draft_logits"][:, :5], atol=1e-5
    )
    following = torch.cat([IDS[:, 1:], torch.zeros(2, 1).long()], 1)
    assert torch.equal(done(input_ids=IDS, draft_ids=following)["draft_logits"], found["draft_logits"])
    other = following.clone()
    other[:, 4] = (other[:, 4] + 1) % 90 + 3
    changed = done(input_ids=IDS, draft_ids=other)
    assert torch.allclose(changed["draft_logits"][:, :4], found["draft_logits"][:, :4], atol=1e-6)
    assert not torch.allclose(changed["draft_logits"][:, 4], found["draft_logits"][:, 4], atol=1e-4)
    assert torch.equal(changed["logits"], found["logits"])


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_whatever_it_says_the_text_is_the_same(
    tokens: int, name: str, captured: Callable[[str], Program], tmp_path: Any
) -> None:
    program = varied(name, captured(name))[0]
    expected = generated(program, ROWS)
    drafted = graphopt.optimize(program, "attach-draft")
    for made in (drafted, shaken(drafted)):
        found = graphopt.stream(
            made, ROWS, max_new_tokens=12, eos_token_id=None, strategy=AttachedDraft(tokens)
        )
        for _ in found:
            pass
        assert [row[-12:] for row in found.rows] == expected.tolist()
        assert not found.statistics.notes
        assert len(found.statistics.proposed) == tokens
    again = graphopt.load(drafted.save(tmp_path / "saved"))
    assert torch.equal(generated(again, ROWS, strategy="attached-draft{tokens=2 threshold=0.1}"), expected)


def test_step_by_step_it_says_what_it_says_at_once(captured: Callable[[str], Program]) -> None:
    """The first candidate after a text is the draft's own prediction on the whole text, whatever was accepted before."""
    program = varied("llama", captured("llama"))[0]
    made = shaken(graphopt.optimize(program, "attach-draft"))
    proposed: list[tuple[list[int], int]] = []

    class Watched(AttachedDraft):
        def propose(self, rows: Any, room: Any) -> Any:
            drafts = super().propose(rows, room)
            proposed.extend((list(r), d.tokens[0]) for r, d in zip(rows, drafts, strict=True) if d.tokens)
            return drafts

    for _ in graphopt.stream(made, ROWS, max_new_tokens=12, eos_token_id=None, strategy=Watched(3)):
        pass
    assert len(proposed) > 12
    checked = 0
    for row, token in proposed:
        if len(row) > 1:
            whole = made(input_ids=torch.tensor([row]))["draft_logits"][0, -2]
            checked += int(whole.argmax()) == token
    assert checked == sum(len(row) > 1 for row, _ in proposed)


def test_it_learns_to_say_what_the_model_says(captured: Callable[[str], Program]) -> None:
    program = varied("llama", captured("llama"))[0]
    made = graphopt.optimize(program, "attach-draft{taps=[0 1] layer=0}")
    data = [
        {"input_ids": torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(s))}
        for s in range(2)
    ]
    done, record = graphopt.train(
        made, "draft{noise=0.05}", data, Settings(steps=60, learning_rate=1e-2, warmup=0)
    )
    assert record.losses[-1] < 0.8 * record.losses[0]
    assert torch.equal(done(input_ids=IDS)["logits"], program(input_ids=IDS)["logits"]), (
        "the model was trained too"
    )
    with pytest.raises(UsageError, match="has no draft"):
        Draft().recipe(program)
    with pytest.raises(PassRefusedError, match="there is no layer 7"):
        graphopt.optimize(program, "attach-draft{taps=[0 7]}")
    with pytest.raises(UsageError, match="has no draft"):
        graphopt.generate(program, [[5, 3]], max_new_tokens=3, strategy="attached-draft")
