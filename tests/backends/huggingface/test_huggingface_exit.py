"""Folders written back: they load with transformers alone, or are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo

import graphopt
from graphopt import LoweringError
from graphopt.backends.huggingface.config import renumbered
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.facts import RemovedLayers, note_checkpoint
from graphopt.ir.program import Program


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            zoo.make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def uncompared(folder_of) -> Callable[[str], Program]:
    """The program of a folder, captured when it is first asked for; passes leave it as it is."""
    return cache(lambda name: capture_huggingface(folder_of(name), compare=False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "olmoe", "gemma3", "deepseek_v3", "t5"])
def test_a_layer_fewer_loads_elsewhere_and_agrees(name: str, uncompared, tmp_path: Path) -> None:
    program = uncompared(name)
    shorter = graphopt.optimize(program, "skip-layers{layers=[1]}")
    report = shorter.save_pretrained(tmp_path / "out")
    assert report.checked == "reload"
    assert max(report.errors.values()) < 1e-5, "the folder computes something else than the program"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = config.get("layer_types")
    assert kinds is None or len(kinds) == 1, "a per-layer list kept the length it had"


@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral", "olmoe"])
def test_folded_norms_go_back_into_the_same_architecture(name: str, uncompared, tmp_path: Path) -> None:
    program = uncompared(name)
    folded = graphopt.optimize(program, "fold-norms")
    report = folded.save_pretrained(tmp_path / "out")
    assert max(report.errors.values()) < 1e-5, "norm weights were folded and kept, or dropped and not folded"


def test_fused_projections_go_back_unfused_even_after_saving(folder_of, uncompared, tmp_path: Path) -> None:
    program = uncompared("llama")
    graphopt.optimize(program, "fuse-projections").save(tmp_path / "saved")
    loaded = graphopt.load(tmp_path / "saved")
    stored = sum(f.stat().st_size for f in (tmp_path / "saved" / "weights").iterdir())
    original = (folder_of("llama") / "model.safetensors").stat().st_size
    assert stored < 1.1 * original, "fused weights were stored beside the original ones"
    report = loaded.save_pretrained(tmp_path / "out")
    assert max(report.errors.values()) < 1e-6, "the way back from a fused weight is wrong"


def test_both_ways_of_reloading_say_the_same(
    uncompared, reloading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if the tests' own way of starting the check saw, or said, something else than the one that users get."""
    from graphopt.backends.huggingface import save as huggingface

    program = uncompared("llama")
    served = program.save_pretrained(tmp_path / "served").errors
    missing = huggingface._child([str(tmp_path / "none"), "LlamaForCausalLM", "a", "b", "float32"])
    monkeypatch.setattr(huggingface, "_child", reloading)
    assert program.save_pretrained(tmp_path / "started").errors == served
    again = huggingface._child([str(tmp_path / "none"), "LlamaForCausalLM", "a", "b", "float32"])
    assert missing[0] == again[0] == 1
    assert missing[1].strip().splitlines()[-1] == again[1].strip().splitlines()[-1]


def test_what_the_architecture_cannot_say_is_refused(uncompared, tmp_path: Path) -> None:
    program = uncompared("llama")
    shorter = graphopt.optimize(program, "skip-layers{layers=[1] unit=attention}")
    with pytest.raises(LoweringError, match="parts of layers"):
        shorter.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a refused folder was left behind"


@pytest.mark.usefixtures("own_process")
def test_an_unknown_change_is_caught_by_the_reload(uncompared, tmp_path: Path) -> None:
    program = uncompared("llama").copy()
    node = program.anatomy.ffn[0].parts["down"]
    program.insert_after(node, lambda x: x * 1.5)
    with pytest.raises(LoweringError, match="differs from the program"):
        program.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_without_checkpoint_is_refused(tmp_path: Path) -> None:
    program = graphopt.capture(torch.nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(LoweringError, match="not captured from a Hugging Face checkpoint"):
        program.save_pretrained(tmp_path / "out")


def test_streamed_check_agrees_with_reload(uncompared, tmp_path: Path) -> None:
    program = uncompared("llama")
    report = program.save_pretrained(tmp_path / "out", check="streamed", shard_bytes=30_000)
    assert max(report.errors.values()) < 1e-6
    assert "model.safetensors.index.json" in report.files, "small shards were asked for"


def test_a_tensor_of_a_removed_layer_that_is_still_read_takes_no_name_of_another(
    uncompared, tmp_path: Path
) -> None:
    """Wrong if the last of two tensors of one name is written."""
    program = uncompared("llama").copy()
    note_checkpoint(program, removed_layers=(RemovedLayers("model.layers.", 2, (0,)),))
    with pytest.raises(LoweringError, match="two tensors would be called model.layers.0"):
        program.save_pretrained(tmp_path / "out")


def test_an_output_without_a_place_is_refused_by_name(uncompared, tmp_path: Path) -> None:
    program = uncompared("llama").copy()
    program.add_output("depth_logits", program.outputs["logits"])
    with pytest.raises(
        LoweringError, match="returns depth_logits, for which a folder of LlamaForCausalLM has no place"
    ):
        program.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_close_up() -> None:
    stack = [RemovedLayers("h.", 4, (0, 2))]
    assert [renumbered(f"h.{i}.w", stack) for i in (1, 3)] == ["h.0.w", "h.1.w"]
    assert renumbered("wte.weight", stack) == "wte.weight"


def test_a_fused_program_that_was_saved_leaves_without_a_layer(uncompared, tmp_path: Path) -> None:
    """The ways back from what was fused in a layer go with it; its neighbour takes its name."""
    program = uncompared("llama")
    graphopt.optimize(program, "fuse-projections").save(tmp_path / "saved")
    shorter = graphopt.optimize(graphopt.load(tmp_path / "saved"), "skip-layers{layers=[0]}")
    assert not any(".layers.0." in name for name in shorter.checkpoint)
    assert max(shorter.save_pretrained(tmp_path / "out").errors.values()) < 1e-6


def test_a_checkpoint_of_somebody_else_is_not_replaced(uncompared, tmp_path: Path) -> None:
    """Wrong if writing to the folder that was read, or that another tool trained, would take its weights away."""
    program = uncompared("llama")
    theirs = tmp_path / "theirs"
    zoo.make("llama").save_pretrained(theirs)
    before = {f.name: f.read_bytes() for f in theirs.iterdir()}
    with pytest.raises(graphopt.UsageError, match="must not be replaced"):
        program.save_pretrained(theirs)
    assert {f.name: f.read_bytes() for f in theirs.iterdir()} == before
    program.save_pretrained(tmp_path / "ours")
    program.save_pretrained(tmp_path / "ours")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "theirs"]
