"""Heads, exits and smaller heads: old outputs stay, new ones say what they should, and text stays the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.decoding import DraftProgram, EarlyExit, MultiTokenHeads
from graphopt.decoding.drafters import best_paths, expected_tokens
from graphopt.decoding.drafters.multi_token_heads import best_size
from graphopt.decoding.generation import with_cache
from graphopt.ir.errors import CheckpointError, PassRefusedError, UsageError
from graphopt.ir.facts import MultiTokenHeads as Heads
from graphopt.ir.facts import Vocabulary
from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory
from graphopt.passes.heads.attach_early_exit import exit_quality, split_at
from graphopt.passes.heads.attach_multi_token_heads import PREFIX, write_heads
from graphopt.training import Settings
from graphopt.training.recipes import Medusa, head_loss

IDS = {"input_ids": torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(3))}


@pytest.fixture(scope="module")
def llama(captured: Callable[[str], Program]) -> Program:
    return varied("llama", captured("llama"))[0]


def shaken(program: Program, seed: int = 0) -> Program:
    """Heads that say something of their own."""
    done, generator = program.copy(), torch.Generator().manual_seed(seed)
    for node, weight in program.weights.items():
        if weight.name.startswith(PREFIX):
            value = weight.source.load()
            drawn = torch.randn(value.shape, generator=generator) * 0.3
            done.weights[node] = replace(weight, source=InMemory(value + drawn))
    return done


@pytest.mark.parametrize("options", ["", "{heads=2 layers=2}", "{heads=3 share=true}"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_heads_leave_the_logits_and_begin_as_the_models_own(
    options: str, name: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    done = graphopt.optimize(program, f"attach-multi-token-heads{options}")
    before, after = program(**IDS)["logits"], done(**IDS)
    assert torch.equal(after["logits"], before)
    said = after["multi_token_logits"]
    assert said.shape[:2] == before.shape[:2]
    assert torch.equal(said[:, :, 0], said[:, :, -1])
    assert torch.equal(said[:, :, 0].argmax(-1), before.argmax(-1)), (
        "an untrained head is not a copy of the model's"
    )
    assert not torch.allclose(shaken(done)(**IDS)["multi_token_logits"], said, atol=1e-3)


@pytest.mark.parametrize("nodes", [1, 5, 12])
@pytest.mark.parametrize("options", ["{heads=3}", "{heads=2 share=true}"])
def test_whatever_heads_say_the_text_is_the_same(nodes: int, options: str, llama: Program) -> None:
    expected = generated(llama, ROWS)
    heads = graphopt.optimize(llama, f"attach-multi-token-heads{options}")
    for program in (heads, shaken(heads)):
        found = graphopt.stream(
            program, ROWS, max_new_tokens=12, eos_token_id=None, strategy=MultiTokenHeads(nodes)
        )
        for _ in found:
            pass
        assert [row[-12:] for row in found.rows] == expected.tolist()
        assert not found.statistics.notes
        assert sum(found.statistics.proposed) > 0


def test_head_k_is_about_the_token_k_plus_two_places_on() -> None:
    """A head that knows the text has no loss, one that is a place off has much."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5, 3, 5]])
    logits = torch.zeros(1, 10, 8)
    for right in (True, False):
        said = torch.zeros(1, 10, 2, 8)
        for head in range(2):
            for place in range(10):
                at = place + head + 2 + (0 if right else -1)
                if at < 10:
                    said[0, place, head, ids[0, at]] = 50.0
        loss = float(head_loss(said, logits, {"input_ids": ids}, 0.8))
        assert loss < 1e-6 if right else loss > 5
    # from the model: its logits at place t + k + 1 are about the token after it
    own = torch.randn(1, 10, 8) * 9
    said = torch.stack([torch.roll(own, -1 - k, dims=1) for k in range(2)], 2)
    close = float(head_loss(said, own, {"input_ids": ids}, 1.0, True))
    far = float(head_loss(said.roll(1, 1), own, {"input_ids": ids}, 1.0, True))
    assert close < 0.5 * far
    # padding counts nowhere
    mask = torch.tensor([[1] * 6 + [0] * 4])
    changed = said.clone()
    changed[:, 6:] = 7.0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(head_loss(said, own, batch, 1.0), head_loss(changed, own, batch, 1.0))


def test_training_heads_leaves_the_model_and_measures_them(llama: Program) -> None:
    heads = graphopt.optimize(llama, "attach-multi-token-heads{heads=2}")
    data = [{"input_ids": torch.arange(3, 19)[None].repeat(4, 1) + n} for n in range(3)]
    settings = Settings(steps=30, learning_rate=3e-2, warmup=0)
    done, record = graphopt.train(heads, "medusa", data, settings)
    assert record.losses[-1] < 0.5 * record.losses[0]
    assert torch.equal(done(**IDS)["logits"], llama(**IDS)["logits"]), "Medusa-1 changed the model"
    accuracy = done.facts[Heads].accuracy
    assert len(accuracy) == 2
    assert all(0 <= x <= 1 for row in accuracy for x in row)
    both, _ = graphopt.train(heads, "medusa{joint=true}", data, settings)
    assert not torch.equal(both(**IDS)["logits"], llama(**IDS)["logits"]), "Medusa-2 trains the model as well"
    with pytest.raises(UsageError, match="no multi-token heads"):
        Medusa().recipe(llama)


def test_heads_go_out_and_come_back(llama: Program, tmp_path: Path) -> None:
    heads = shaken(graphopt.optimize(llama, "attach-multi-token-heads{heads=2}"))
    names = write_heads(heads, tmp_path / "heads.safetensors")
    assert names == [
        "0.0.linear.bias",
        "0.0.linear.weight",
        "0.1.weight",
        "1.0.linear.bias",
        "1.0.linear.weight",
        "1.1.weight",
    ]
    text = f'attach-multi-token-heads{{heads=2 weights="{tmp_path / "heads.safetensors"}"}}'
    again = graphopt.optimize(llama, text)
    assert torch.equal(again(**IDS)["multi_token_logits"], heads(**IDS)["multi_token_logits"])
    loaded = graphopt.load(again.save(tmp_path / "saved"))
    assert torch.equal(generated(loaded, ROWS, 8, strategy=MultiTokenHeads()), generated(llama, ROWS, 8))
    with pytest.raises(UsageError, match="exists already"):
        write_heads(heads, tmp_path / "heads.safetensors")
    with pytest.raises(UsageError, match="no multi-token heads"):
        write_heads(llama, tmp_path / "none.safetensors")
    with pytest.raises(PassRefusedError, match="has no tensor 2.0.linear.weight"):
        graphopt.optimize(llama, text.replace("heads=2", "heads=3"))
    with pytest.raises(PassRefusedError, match="there is no file"):
        graphopt.optimize(llama, 'attach-multi-token-heads{weights="nowhere.safetensors"}')
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(CheckpointError):
        graphopt.optimize(llama, f'attach-multi-token-heads{{weights="{tmp_path / "broken.safetensors"}"}}')


def test_heads_of_another_model_are_refused(
    captured: Callable[[str], Program], llama: Program, tmp_path: Path
) -> None:
    other = graphopt.capture(_wider(), {"input_ids": torch.randint(0, 9, (1, 4))})
    heads = graphopt.optimize(other, "attach-multi-token-heads{heads=1}")
    write_heads(heads, tmp_path / "other.safetensors")
    with pytest.raises(PassRefusedError, match="this model's is"):
        graphopt.optimize(
            llama, f'attach-multi-token-heads{{heads=1 weights="{tmp_path / "other.safetensors"}"}}'
        )
    with pytest.raises(PassRefusedError, match="returns no logits"):
        graphopt.optimize(captured("bert"), "attach-multi-token-heads")
    with pytest.raises(UsageError, match="no multi-token heads"):
        graphopt.generate(llama, [[5]], max_new_tokens=3, strategy="multi-token-heads")


def _wider() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()


def test_trees_hold_the_likeliest_paths_with_their_parents() -> None:
    accuracy = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.0], [0.4, 0.1, 0.05]]
    chances = {}
    for nodes in range(1, 20):
        paths = best_paths(accuracy, nodes)
        assert len(set(paths)) == len(paths) <= nodes
        assert all(path[:-1] in paths or len(path) == 1 for path in paths)
        chances[nodes] = expected_tokens(accuracy, paths)
    assert chances[1] == pytest.approx(1.6)
    assert chances[3] == pytest.approx(1 + 0.6 + 0.3 + 0.2), "the best three are (0), (0, 0) and (1)"
    assert all(chances[n] <= chances[n + 1] + 1e-12 for n in range(1, 18))


def test_trees_are_sized_for_a_device_and_a_batch(llama: Program) -> None:
    """Tokens of a step are free while weights are read, and cost once the batch is large."""
    heads = with_cache(graphopt.optimize(llama, "attach-multi-token-heads{heads=3}"))
    accuracy = [[0.6, 0.2, 0.1, 0.05], [0.5, 0.2, 0.1, 0.05], [0.4, 0.2, 0.1, 0.05]]
    alone, crowded = (best_size(heads, accuracy, "h200", batch, 64) for batch in (1, 4096))
    assert alone > crowded
    expected = generated(llama, ROWS)
    assert torch.equal(generated(heads, ROWS, strategy=MultiTokenHeads(None, device="h200")), expected)
    with pytest.raises(UsageError, match="how many nodes, or for which device"):
        MultiTokenHeads(None)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere", "mixtral"])
def test_an_exit_says_what_the_program_without_later_layers_says(
    name: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    done = graphopt.optimize(program, "attach-early-exit{layers=[0]}")
    found = done(**IDS)
    assert torch.equal(found["logits"], program(**IDS)["logits"])
    fewer = graphopt.optimize(program, "skip-layers{layers=[1]}")
    assert torch.allclose(found["exit_logits"], fewer(**IDS)["logits"], atol=1e-6)
    first, second = split_at(program, 0)
    hidden = first(**IDS)["hidden"]
    rest = {n: IDS[n] for n in second.signature.inputs if n in IDS}
    assert torch.equal(second(hidden=hidden, **rest)["logits"], program(**IDS)["logits"])
    assert len(exit_quality(program, IDS)) == 1


def test_heads_exits_and_a_draft_in_one_program(llama: Program) -> None:
    """Each pass finds the model's own head among what the others added, in any order."""
    expected = generated(llama, ROWS, 8)
    whole = None
    for order in (("attach-multi-token-heads", "attach-early-exit{layers=[0]}", "attach-draft"),
                  ("attach-draft", "attach-early-exit{layers=[0]}", "attach-multi-token-heads")):  # fmt: skip
        done = graphopt.optimize(llama, ", ".join(order))
        found = done(**IDS)
        assert torch.equal(found["logits"], llama(**IDS)["logits"])
        if whole is not None:
            for name in ("exit_logits", "draft_logits", "multi_token_logits"):
                assert torch.equal(found[name], whole[name]), f"{name} depends on the order of passes"
        whole = found
        for strategy in ("multi-token-heads", "early-exit", "attached-draft"):
            assert torch.equal(generated(done, ROWS, 8, strategy=strategy), expected)


def test_first_layers_draft_for_all(llama: Program) -> None:
    expected = generated(llama, ROWS)
    done = graphopt.optimize(llama, "attach-early-exit{layers=[0]}")
    for strategy in (EarlyExit(3), EarlyExit(2, threshold=0.3), "early-exit{tokens=1}"):
        assert torch.equal(generated(done, ROWS, strategy=strategy), expected)
    for wrong in ("[1]", "[7]", "[0 0]"):
        with pytest.raises(PassRefusedError, match="exits lie after"):
            graphopt.optimize(llama, f"attach-early-exit{{layers={wrong}}}")
    with pytest.raises(PassRefusedError, match="is split after one from 0 to 0"):
        split_at(llama, 1)
    with pytest.raises(UsageError, match="no exits"):
        graphopt.generate(llama, [[5]], max_new_tokens=3, strategy=EarlyExit())


def test_a_draft_with_fewer_tokens(llama: Program, captured: Callable[[str], Program]) -> None:
    expected = generated(llama, ROWS)
    draft = graphopt.optimize(captured("llama"), "trim-vocabulary{keep=20}", data=[IDS])
    ids = list(draft.facts[Vocabulary].ids)
    assert len(ids) == 20 and ids == sorted(ids)
    assert {0, 1, 2} <= set(ids), "special tokens went"
    whole, part = captured("llama")(**IDS)["logits"], draft(**IDS)["logits"]
    assert torch.allclose(part, whole[..., ids], atol=1e-6)
    assert torch.equal(generated(llama, ROWS, strategy=DraftProgram(draft, 3)), expected)
    same = graphopt.optimize(llama, "trim-vocabulary{fraction=1.0}")
    found = graphopt.stream(llama, ROWS, max_new_tokens=9, eos_token_id=None, strategy=DraftProgram(same, 2))
    for _ in found:
        pass
    assert found.statistics.acceptance == [1.0, 1.0], "all tokens in their order are the program itself"
    for wrong, match in (("keep=500", "cannot stay"), ("keep=2", "special tokens always stay")):
        with pytest.raises(PassRefusedError, match=match):
            graphopt.optimize(llama, f"trim-vocabulary{{{wrong}}}")
    with pytest.raises(graphopt.PipelineError, match="how many tokens to keep"):
        graphopt.optimize(llama, "trim-vocabulary")


def test_drawing_through_a_smaller_draft_keeps_the_distribution(llama: Program, captured: Any) -> None:
    """q is 0 outside of what the draft knows, and the program's other tokens still come up."""
    draft = graphopt.optimize(captured("llama"), "trim-vocabulary{keep=6}")
    row = [[5, 9]]
    logits = llama(input_ids=torch.tensor(row))["logits"][0, -1]
    outside = 1 - float(torch.softmax(logits.double() / 5, -1)[list(draft.facts[Vocabulary].ids)].sum())
    found = graphopt.generate(
        llama,
        row * 400,
        max_new_tokens=1,
        temperature=5.0,
        eos_token_id=None,
        strategy=DraftProgram(draft, 1),
    )[:, -1]
    share = sum(int(t) not in list(draft.facts[Vocabulary].ids) for t in found) / 400
    assert abs(share - outside) < 0.1
