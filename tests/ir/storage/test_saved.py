"""Saved programs: the same function, the same bytes when written again, and everything that belongs to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import everything_in
from forks import Forks
from paths import ROOT
from torch import nn

import graphopt
from graphopt import CheckpointError, Program, UsageError
from graphopt.ir.checking.verify import verify
from graphopt.ir.facts import FusedProjections
from graphopt.ir.program import Dial
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.running.execute import run
from graphopt.ir.storage import write

SOURCE = ROOT / "src"
SIZES = [
    {"batch": 1, "sequence": 1},
    {"batch": 1, "sequence": 7},
    {"batch": 3, "sequence": 11},
    {"batch": 2, "sequence": 31},
]
Programs = Callable[[str], Program]
Folders = Callable[[str], Path]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert", "olmoe", "t5", "convnext"])
def test_what_is_loaded_computes_what_was_saved(name: str, captured: Programs, saved: Folders) -> None:
    before, after = captured(name), graphopt.load(saved(name), check_hashes=True)
    for sizes in SIZES:
        for padding in ("left", "right", "none"):
            inputs = example_inputs(before, sizes, padding=padding)
            expected, found = run(before, inputs), run(after, inputs)
            assert list(found) == list(expected)
            for key, value in expected.items():
                assert torch.equal(found[key], value), f"{key} differs at {sizes}, padded {padding}"
            streamed = run(after, inputs, streamed=True)
            assert all(torch.allclose(streamed[k], v, atol=1e-6) for k, v in expected.items())
    verify(after)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert", "olmoe", "t5", "convnext"])
def test_written_again_it_is_the_same_bytes(
    name: str, captured: Programs, saved: Folders, tmp_path: Path
) -> None:
    graphopt.load(saved(name)).save(tmp_path / "again")
    captured(name).copy().save(tmp_path / "copy")
    first = everything_in(saved(name))
    assert everything_in(tmp_path / "again") == first, "reading and writing changes a program"
    assert everything_in(tmp_path / "copy") == first, "a copy is written as something else"


def test_everything_that_describes_it_comes_back(captured: Programs, saved: Folders) -> None:
    before, after = captured("bert"), graphopt.load(saved("bert"))
    assert after.signature == before.signature
    assert after.signature.sizes["sequence"].high == 64
    assert after.operators == before.operators
    assert after.origin == before.origin
    assert after.origin.config["vocab_size"] == 101
    assert after.facts == before.facts
    assert set(after.checkpoint) == set(before.checkpoint)
    assert [b.evidence for b in after.anatomy.blocks] == [b.evidence for b in before.anatomy.blocks]
    line = after.source_line(after.anatomy.attention[0].term)
    assert "modeling_bert.py" in line, "the line of the model that a node came from is lost"
    for node in after.weight_nodes:
        one, other = after.weights[node.name], before.weights[node.name]
        assert (one.name, one.names, one.kind, one.persistent, one.trainable) == (
            other.name, other.names, other.kind, other.persistent, other.trainable,
        )  # fmt: skip


def test_it_runs_where_transformers_cannot_be_imported(
    captured: Programs, saved: Folders, forks: Forks, tmp_path: Path
) -> None:
    ids = torch.arange(3, 17).reshape(2, 7)
    torch.save(ids, tmp_path / "ids")
    code = f"""
import sys
assert "transformers" not in sys.modules
sys.modules["transformers"] = sys.modules["tokenizers"] = None
import torch, graphopt
program = graphopt.load({str(saved("llama"))!r}, check_hashes=True)
found = program(torch.load({str(tmp_path / "ids")!r}, weights_only=True))
assert found.logits is found["logits"] is found.to_tuple()[0]
torch.save(found.logits, {str(tmp_path / "logits")!r})
torch.save(program.module()(torch.load({str(tmp_path / "ids")!r})).logits.detach(), {str(tmp_path / "module")!r})
graphopt.optimize(program, "fuse-projections").save({str(tmp_path / "fused")!r})
assert sys.modules["transformers"] is None
"""
    status, done = forks.run(code)
    assert status == 0, done.stderr
    output = captured("llama")(ids)
    assert type(output).__name__ == "CausalLMOutputWithPast", "where the library is there, its class is used"
    assert torch.equal(torch.load(tmp_path / "logits"), output.logits)
    assert torch.allclose(torch.load(tmp_path / "module"), output.logits, atol=1e-6)
    assert torch.allclose(graphopt.load(tmp_path / "fused")(ids).logits, output.logits, atol=1e-6)


# -- weights ----------------------------------------------------------------------------------------------


def test_ties_stay_ties(captured: Programs, saved: Folders) -> None:
    program = graphopt.load(saved("llama_tied"))
    one, other = (program.weight_node(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert one is other, "a tied tensor became two"
    assert set(program.weights[one.name].all_names) == {"lm_head.weight", "model.embed_tokens.weight"}
    module = program.module()
    assert module.get_parameter("lm_head.weight") is module.get_parameter("model.embed_tokens.weight")
    size = sum(p.stat().st_size for p in (saved("llama_tied") / "weights").iterdir())
    untied = sum(p.stat().st_size for p in (saved("llama") / "weights").iterdir())
    assert untied - size > 101 * 32 * 4 - 1000, "a tied tensor is stored twice"


def test_weights_are_read_when_they_are_needed(saved: Folders, tmp_path: Path) -> None:
    graphopt.load(saved("llama")).save(tmp_path / "p")
    program = graphopt.load(tmp_path / "p")
    (tmp_path / "p" / "weights" / "00001.safetensors").unlink()
    assert "aten.linear" in program.text()
    with pytest.raises(CheckpointError, match="cannot read tensor"):
        program(torch.full((1, 3), 7))


def test_many_files_are_one_program(saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = graphopt.load(saved("llama"))
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    counted: dict[str, int] = {}
    program.save(tmp_path / "p", progress=lambda name, size: counted.update({name: size}))
    files = sorted((tmp_path / "p" / "weights").iterdir())
    assert len(files) > 3
    assert all(f.stat().st_size < 25_000 for f in files)
    assert sum(counted.values()) == sum(w.bytes for w in program.weights.values()), "progress missed a tensor"
    again = graphopt.load(tmp_path / "p", check_hashes=True)
    ids = torch.full((1, 3), 7)
    assert torch.equal(again(ids).logits, program(ids).logits)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        graphopt.load(tmp_path / "p")


def test_what_depends_on_weights_alone_is_computed_once(captured: Programs, tmp_path: Path) -> None:
    fused = graphopt.optimize(captured("llama"), "fuse-projections", verify="off")
    fused.save(tmp_path / "folded")
    fused.save(tmp_path / "kept", fold_weights=False)
    folded, kept = graphopt.load(tmp_path / "folded"), graphopt.load(tmp_path / "kept")
    assert "aten.cat" in kept.operators
    assert kept.operators == fused.operators
    assert folded.operators["aten.cat"] < kept.operators["aten.cat"], (
        "weights are joined again at every start"
    )
    ids = torch.full((2, 5), 9)
    assert torch.allclose(folded(ids).logits, kept(ids).logits, atol=1e-6)


class Kinds(nn.Module):
    """A parameter that is frozen, and buffers of many types, one of them in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.trained = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("small", torch.tensor([1, -2, 3, 100], dtype=torch.int8))
        self.register_buffer("wide", torch.randn(4, dtype=torch.float64))
        self.register_buffer("brief", torch.randn(4).to(torch.bfloat16), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("one", torch.tensor(3.5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = (x * self.trained + self.frozen) * self.one
        y = torch.where(self.mask, y, float("-inf")).clamp(max=float("inf"))
        z = torch.cat([self.empty, x]).double() * self.wide + self.small + self.brief
        return {"y": y, "nested": (z, [x - 1e-300, {"deep": x > 0}]), "constant": "kept", "none": None}


def test_types_constants_and_structure_come_back(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    program = graphopt.capture(Kinds(), x)
    program.save(tmp_path / "p")
    loaded = graphopt.load(tmp_path / "p")
    before, after = program(x), loaded(x)
    assert torch.equal(after["y"], before["y"])
    assert torch.isneginf(after["y"][:, 1]).all()
    assert torch.equal(after["nested"][0], before["nested"][0])
    assert torch.equal(after["nested"][1][1]["deep"], x > 0)
    assert (after["constant"], after["none"]) == ("kept", None)
    weights = {w.name: w for w in loaded.weights.values()}
    assert {n: w.source.dtype for n, w in weights.items()}.items() >= {
        "mask": torch.bool, "small": torch.int8, "wide": torch.float64, "brief": torch.bfloat16,
    }.items()  # fmt: skip
    assert (weights["frozen"].trainable, weights["trained"].trainable) == (False, True)
    assert (weights["brief"].persistent, weights["wide"].persistent) == (False, True)


# -- what passes leave ------------------------------------------------------------------------------------


def test_facts_and_history_come_back_and_are_built_on(captured: Programs, tmp_path: Path) -> None:
    fused = graphopt.optimize(captured("llama"), "fuse-projections{layout=grouped where=attention}")
    fused.save(tmp_path / "fused")
    loaded = graphopt.load(tmp_path / "fused")
    assert loaded.facts == fused.facts
    assert FusedProjections in loaded.facts
    assert loaded.history == json.loads(json.dumps(fused.history))
    (entry,) = loaded.history
    assert entry["pass"] == "fuse-projections{layout=grouped where=attention}"
    assert [s["block"] for s in entry["plan"]["sites"]] == ["attention.0", "attention.1"]
    assert entry["contract"] == "exact"
    assert 0 <= entry["error"] < 1e-11
    split = graphopt.optimize(loaded, "split-projections")
    assert [e["pass"] for e in split.history] == [entry["pass"], "split-projections"]
    assert FusedProjections not in split.facts
    assert len(loaded.history) == 1, "a pass wrote into the program it was given"
    ids = torch.full((2, 5), 9)
    assert torch.allclose(split(ids).logits, captured("llama")(ids).logits, atol=1e-5)


def test_dials_come_back_with_their_limits(tmp_path: Path) -> None:
    program = graphopt.capture(nn.Linear(4, 3), torch.randn(2, 4))
    dial = program.add_dial("strength", Dial(1.0, 0.0, float("inf"), "how much of it"))
    with program.edit.before(program.output_node):
        scaled = program.edit.emit(lambda y, s: y * s.to(torch.float32), program.outputs["output"], dial)
    program.edit.set_outputs([scaled])
    program.save(tmp_path / "p")
    loaded = graphopt.load(tmp_path / "p")
    assert loaded.dials == {"strength": Dial(1.0, 0.0, float("inf"), "how much of it")}
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), program(x))
    assert torch.allclose(loaded(x, strength=0.5), 0.5 * loaded(x)), (
        "a dial of a loaded program turns nothing"
    )
    with pytest.raises(UsageError, match="strength"):
        loaded(x, strength=-1.0)


def test_a_program_that_cannot_be_saved_says_why(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = graphopt.capture(Rare(), torch.randn(2, 3))
    with pytest.raises(CheckpointError, match="special_bessel_j0.* is not one that a saved program may hold"):
        program.save(tmp_path / "p")

    class Named(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            return x["a=1"] + 1

    program = graphopt.capture(Named(), {"x": {"a=1": torch.randn(2, 3)}})
    with pytest.raises(CheckpointError, match="cannot be the name of an input"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_outputs_whose_flat_names_would_meet_are_told_apart(tmp_path: Path) -> None:
    class Meeting(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": (x + 1, x + 2), "a_0": x * 3}

    x = torch.randn(2, 3)
    program = graphopt.capture(Meeting(), x)
    program.save(tmp_path / "p")
    for each in (program, graphopt.load(tmp_path / "p")):
        found = each(x)
        assert torch.equal(found["a"][0], x + 1), "one output was returned in place of another"
        assert torch.equal(found["a_0"], x * 3)


def test_a_loaded_program_can_be_edited_like_a_captured_one(tmp_path: Path) -> None:
    network = convolutions()
    folded = graphopt.optimize(saved_and_loaded(network, tmp_path / "p"), "fold-norms")
    verify(folded)
    folded.save(tmp_path / "q")
    image = torch.randn(70, 3, 21, 33)
    assert torch.allclose(graphopt.load(tmp_path / "q")(image), network(image), atol=1e-4)


def test_sizes_of_a_loaded_program_stay_as_wide_as_they_were(tmp_path: Path) -> None:
    loaded = saved_and_loaded(convolutions(), tmp_path / "p")
    before = dict(loaded.exported_program().range_constraints)
    verify(loaded)
    assert dict(loaded.exported_program().range_constraints) == before, (
        "looking at a program narrowed its sizes"
    )


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def saved_and_loaded(model: nn.Module, place: Path) -> Program:
    graphopt.capture(model, torch.randn(2, 3, 16, 16)).save(place)
    return graphopt.load(place)
