"""Blocks and nodes that were read before an edit: looked up again, or refused, and never edited past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program

DEEP = {"num_hidden_layers": 4}
IDS = torch.tensor([[5, 9, 17, 40, 3, 8, 22]])


def deep(name: str) -> Program:
    """Return a program of four layers, with weights under which every layer matters."""
    case = zoo.CASES[name]
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**{**case.options, **DEEP, "initializer_range": 0.3})
    model = getattr(transformers, case.model)(config).eval()
    return graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {name: deep(name) for name in ("llama", "gpt_neox", "cohere")}


def logits(program: Program) -> torch.Tensor:
    found: torch.Tensor = program(input_ids=IDS)["logits"]
    return found


@settings(max_examples=examples(24), deadline=None)
@given(data=st.data(), name=st.sampled_from(["llama", "gpt_neox", "cohere"]))
def test_blocks_leave_in_any_order(data: Any, name: str, programs: dict[str, Program]) -> None:
    """Read once and removed in any order, they leave what their removal from the last to the first leaves."""
    program = programs[name]
    unit = data.draw(st.sampled_from(["layers", "blocks"]))
    count = len(getattr(program.anatomy, unit))
    order = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count - 1))]
    found = program.copy()
    units = list(getattr(found.anatomy, unit))
    for number in order:
        found.remove(units[number])
    expected = program.copy()
    for number in sorted(order, reverse=True):
        expected.remove(getattr(expected.anatomy, unit)[number])
    assert torch.allclose(logits(found), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(found), logits(program), atol=1e-3)
    assert len(getattr(found.anatomy, unit)) == count - len(order)


def test_a_block_after_another_edit(programs: dict[str, Program]) -> None:
    """What was put on the stream before a block stays when the block leaves."""
    program = programs["llama"].copy()
    block = program.anatomy.ffn[1]
    program.insert_after(block.reads, lambda x: x * 0.5)
    program.remove(block)
    expected = programs["llama"].copy()
    block = expected.anatomy.ffn[1]
    expected.remove(block)
    expected.insert_after(block.reads, lambda x: x * 0.5)
    assert torch.equal(logits(program), logits(expected))


def test_a_block_that_left_is_refused(programs: dict[str, Program]) -> None:
    program = programs["llama"].copy()
    block = program.anatomy.ffn[1]
    program.remove(block)
    text = program.text()
    with pytest.raises(UsageError, match=r"ffn\.1 is no longer part of the program"):
        program.remove(block)
    with pytest.raises(UsageError, match="another program"):
        program.copy().remove(program.anatomy.ffn[0])
    assert program.text() == text


@pytest.mark.parametrize(
    "edit",
    [
        lambda p, old, live: p.replace(old, torch.relu, live),
        lambda p, old, live: p.replace(live, torch.relu, old),
        lambda p, old, live: p.insert_after(old, torch.relu),
        lambda p, old, live: p.bypass(old, with_=live),
        lambda p, old, live: p.bypass(live, with_=old),
        lambda p, old, live: p.edit.change(old, bias=None),
        lambda p, old, live: p.edit.call(torch.ops.aten.relu.default, old),
        lambda p, old, live: p.add_output("more", old),
        lambda p, old, live: p.edit.set_outputs([old]),
    ],
)
def test_nodes_that_left_are_refused(edit: Callable[..., Any], programs: dict[str, Program]) -> None:
    """Every editing verb says so, and leaves the graph as it was."""
    program = programs["llama"].copy()
    block = program.anatomy.ffn[3]
    gone, live = block.term, block.reads
    program.remove(block)
    other = programs["llama"].copy().anatomy.ffn[2].term
    text = program.text()
    for node, message in ((gone, "no longer part of the program"), (other, "another program")):
        with pytest.raises(UsageError, match=message):
            edit(program, node, live)
        assert program.text() == text
        assert torch.isfinite(logits(program)).all()
