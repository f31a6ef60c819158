"""A decoder in two parts: each has its own layers and their caches, and one after the other they are the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.ir.errors import PassRefusedError
from graphopt.ir.facts import EarlyExits, KVCache
from graphopt.ir.program import Program
from graphopt.ir.running.recurrent_state import states_of
from graphopt.ir.schema import is_operator
from graphopt.passes.heads.attach_early_exit import split_at

CAPACITY = 12


def deep(name: str, layers: int = 3) -> Program:
    import transformers

    case = zoo.CASES[name]
    torch.manual_seed(0)
    options = {**case.options, "num_hidden_layers": layers, "initializer_range": 0.3}
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**options)).eval()
    return graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """One with a window and candidates, one with a bias by position, one that also says something halfway."""
    exits = graphopt.optimize(deep("llama", 4), "attach-early-exit{layers=[1]}")
    return {
        "tree": graphopt.optimize(deep("mistral"), "insert-cache{tree=true}"),
        "fixed": graphopt.optimize(deep("llama"), f"insert-cache{{max_length={CAPACITY}}}"),
        "exits": graphopt.optimize(exits, "insert-cache{tree=true}"),
    }


def steps(program: Program) -> list[dict[str, torch.Tensor]]:
    """Return a prompt, a token, and, where the program takes it, a tree of three candidates."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for start, positions in ((0, [0, 1, 2, 3, 4]), (5, [5]), (6, [6, 7, 7])):
        count = len(positions)
        if start == 6 and "step_mask" not in program.signature.inputs:
            break
        slots = torch.arange(start, start + count).expand(2, -1)
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        if start == 6:
            mask[2, 1] = False
        given = {
            "input_ids": torch.randint(3, 100, (2, count), generator=generator),
            "position_ids": torch.tensor([positions] * 2),
            "cache_slots": slots,
            "step_mask": mask.expand(2, -1, -1),
        }
        made.append({n: v for n, v in given.items() if n in program.signature.inputs})
    return made


def empty(program: Program) -> dict[str, torch.Tensor]:
    shapes = {n: program.signature.inputs[n].shape for n in states_of(program)}
    return {n: torch.zeros(2, int(s[1]), CAPACITY, int(s[3])) for n, s in shapes.items()}


@pytest.mark.parametrize("name", ["tree", "fixed", "exits"])
def test_one_part_after_the_other_is_the_whole(name: str, programs: dict[str, Program]) -> None:
    """Bit for bit, outputs and caches, for a prompt, a token and a tree, wherever it is split."""
    whole = programs[name]
    layers = len(whole.anatomy.layers)
    for layer in range(layers - 1):
        parts = split_at(whole, layer)
        held, own = empty(whole), [empty(part) for part in parts]
        assert not own[0].keys() & own[1].keys() and own[0].keys() | own[1].keys() == held.keys()
        for given in steps(whole):
            expected: dict[str, Any] = whole(**given, **held)
            found: dict[str, Any] = {}
            for part, caches in zip(parts, own, strict=True):
                fed = {n: v for n, v in {**given, **found}.items() if n in part.signature.inputs}
                found |= part(**fed, **caches)
            assert found.keys() == {*expected, "hidden"}
            for output, value in expected.items():
                assert torch.equal(found[output], value), (layer, output)
            held = {n: expected[f"next_{n}"] for n in held}
            own = [{n: found[f"next_{n}"] for n in caches} for caches in own]


@pytest.mark.parametrize("name", ["tree", "fixed", "exits"])
def test_each_part_has_its_own_layers(name: str, programs: dict[str, Program]) -> None:
    """Operators add up, and facts speak of the part's own layers."""
    whole = programs[name]
    layers = whole.facts[KVCache].layers
    for layer in range(layers - 1):
        parts = split_at(whole, layer)
        for operator in ("aten.linear", "graphopt.attention", "graphopt.cache_store", "graphopt.rms_norm"):
            counts = [sum(is_operator(n, operator) for n in p.nodes) for p in (whole, *parts)]
            assert counts[0] == counts[1] + counts[2], operator
        assert [p.facts[KVCache].layers for p in parts] == [layer + 1, layers - layer - 1]
        assert [len(states_of(p)) for p in parts] == [2 * (layer + 1), 2 * (layers - layer - 1)]
        exits = [p.facts.get(EarlyExits) for p in parts]
        if name == "exits":
            assert exits == (
                [EarlyExits({"exit_logits": 1}), None]
                if layer >= 1
                else [None, EarlyExits({"exit_logits": 0})]
            )


def test_decoders_run_parts(programs: dict[str, Program]) -> None:
    whole = programs["tree"]
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(3))
    expected = CachedDecoder(whole, 2, CAPACITY)
    first, second = (CachedDecoder(part, 2, CAPACITY) for part in split_at(whole, 1))
    for piece in ids.split([4, 1, 2], dim=1):
        logits = expected.extend(piece)["logits"]
        hidden = first.extend(piece)["hidden"]
        assert torch.equal(second.extend(hidden)["logits"], logits)
        for decoder in (expected, first, second):
            decoder.advance([piece.shape[1]] * 2)


def test_layers_that_share_more_than_the_stream_are_not_split(programs: dict[str, Program]) -> None:
    """A layer that reads keys of an earlier one would need that layer's cache in both parts."""
    shared = programs["tree"].copy()
    first, *_, last = (n for n in shared.nodes if is_operator(n, "graphopt.attention"))
    last.update_arg(1, first.args[1])
    shared.changed()
    with pytest.raises(PassRefusedError, match="read more of the layers before than the stream"):
        split_at(shared, 0)
