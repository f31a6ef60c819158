"""What passes take from weights goes back to a plain folder, whatever was done to the weights before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt import Program
from graphopt.api import plan_passes
from graphopt.measure.context import Context

pytestmark = pytest.mark.usefixtures("captured_once")

WIDTH = "split-ffn{score=peak}, extract-width{width=0.25}"
EXPERTS = "prune-experts{fraction=0.5 score=random}"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("name", "before", "text"),
    [
        ("gpt2", "", WIDTH),  # its matrices lie transposed
        ("gpt2", "fold-norms", "sort-ffn{score=peak}"),  # norms with biases
        ("llama", "fuse-projections", WIDTH),
        ("llama", "fold-norms", "prune-ffn{fraction=0.5 score=peak}"),
        ("phi3", "fold-norms", "prune-ffn{fraction=0.5 score=peak}"),  # gate and up in one
        ("mixtral", "", EXPERTS),  # a tensor for each expert
        ("mixtral", "fold-norms", EXPERTS),
        ("gpt_oss", "fold-norms", EXPERTS),  # experts stacked and transposed
    ],
)
def test_taken_weights_go_back_into_a_folder(
    name: str, before: str, text: str, saved: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wrong if the folder held a tensor as it was before the pass: the reload would see other sizes or values."""
    program = graphopt.capture(checkpoint(name))
    if before:
        program = graphopt.optimize(program, before)
    if saved:
        program.save(tmp_path / "saved")
        program = graphopt.load(tmp_path / "saved")
    report = graphopt.optimize(program, text).save_pretrained(tmp_path / "out")
    assert report.checked == "reload"
    assert max(report.errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("gpt2", ""),  # matrices are read back transposed
        ("mixtral", ""),  # and here in parts
        ("gemma2", ""),  # a norm's weight is stored less one
        ("phi", "fuse-projections"),  # biases in parts
    ],
)
def test_a_saved_program_folds_as_before(
    name: str, before: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wrong if the ways back to a folder's tensors, which a saved program has, counted as uses of its matrices."""
    program = graphopt.capture(checkpoint(name))
    if before:
        program = graphopt.optimize(program, before)
    program.save(tmp_path / "saved")
    fresh, folded = (graphopt.optimize(p, "fold-norms") for p in (program, tmp_path / "saved"))
    wanted, sites = (len(p.history[-1]["plan"]["sites"]) for p in (fresh, folded))
    assert sites == wanted > 0
    for number, each in enumerate((fresh, folded)):
        report = each.save_pretrained(tmp_path / f"out{number}")
        assert report.checked == "reload"
        assert max(report.errors.values()) < 1e-5


def test_a_bias_that_a_folder_has_no_place_for_is_named(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """A norm's bias goes into a head that has none: said by name, not as outputs that differ."""
    folded = graphopt.optimize(captured("gpt_neox"), "fold-norms")
    with pytest.raises(graphopt.ir.errors.LoweringError, match="gets a bias"):
        folded.save_pretrained(tmp_path / "out")


PLANNED = "fold-norms fuse-projections split-projections sort-ffn{score=peak} fit-target fuse-kernels".split()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2_moe"])
def test_passes_find_the_same_in_a_saved_program(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wrong if what capture leaves for later, such as transposed or joined weights, hid or made a site."""
    program = graphopt.capture(checkpoint(name))
    loaded = graphopt.load(program.save(tmp_path / "saved"))
    for text in PLANNED:
        found = []
        for each in (program, loaded):
            (_, plan), *_ = plan_passes(each, text, Context([]))
            found.append([len(plan.sites), len(plan.refused)])
        assert found[0] == found[1], text


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_scaled_weights_are_stored_once(
    name: str, saved: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wrong if a matrix that a norm was folded into were kept again for the way back."""
    program = graphopt.capture(checkpoint(name))
    if saved:
        program = graphopt.load(program.save(tmp_path / "saved"))
    folded = graphopt.optimize(program, "fold-norms")

    def stored(program: Program, folder: Path) -> int:
        program.save(folder)
        return sum(file.stat().st_size for file in (folder / "weights").iterdir())

    assert stored(folded, tmp_path / "folded") < 1.05 * stored(program, tmp_path / "plain")


def test_a_refusal_prints_no_traceback_of_torch(
    captured: Callable[[str], Program], capfd: pytest.CaptureFixture[str]
) -> None:
    """Experts in groups that fewer do not fill: torch logs the failed call by itself."""
    with pytest.raises(graphopt.ir.errors.PassRefusedError, match="fewer experts"):
        graphopt.optimize(captured("deepseek_v3"), EXPERTS)
    assert "Traceback" not in capfd.readouterr().err


def test_a_matrix_read_whole_elsewhere_stays_what_it_was() -> None:
    """Wrong if the checkpoint's tensor became the part, though another reader has the whole."""
    from graphopt.passes.shared.weight_mapping import follow

    program = graphopt.capture(torch.nn.Linear(4, 4), torch.randn(2, 4)).copy()
    weight = next(n for n in program.weight_nodes if n.meta["val"].dim() == 2)
    with program.edit.after(weight):
        part = program.edit.call(torch.ops.aten.slice.Tensor, weight, 0, 0, 2)
        back = program.edit.call(torch.ops.aten.permute.default, weight, [1, 0])
    program.checkpoint["w"] = back
    follow(program, {weight: part})
    assert program.checkpoint["w"] is back
