"""Every pass on a trained model of ordinary size: 135 million weights, 30 layers, its own vocabulary and positions.

What ``make real`` measures at length (``benchmarks/real_models.py``) is run here once, so that whatever depends on size
(limits on weights, reduced programs, streamed checks, stored files) is met by the suite.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from amounts import THOROUGH
from paths import ROOT

import graphopt
from graphopt import GraphoptError, Program
from graphopt.frontends.checkpoint_files import read_folder
from graphopt.ir.checking.comparison import relative_error
from graphopt.ir.facts import KVCache

sys.path.insert(0, str(ROOT / "benchmarks"))

from real_models import LINES, bundled

# what this model has no place for, and how that is said
REFUSED = {
    "group-heads{size=3}, shard-tensor-parallel{size=3}": "there is nothing to choose",
    "prune-experts{keep=6}": "matched nothing",
    "dial-top-k": "matched nothing",
    "fuse-branches": "matched nothing",
    "expand-branches": "matched nothing",
    "stream-convolutions": "matched nothing",
}
# these change no output that there was
SAME = ("fuse-", "split-projections", "fold-norms", "attach-", "sort-ffn", "fit-target")


@pytest.fixture(scope="module")
def model() -> Program:
    return graphopt.capture(bundled())


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(20, 49_000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(model: Program, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids)["logits"]


@pytest.mark.parametrize(
    "line", [line for line in LINES[1:] if line.suite or THOROUGH], ids=lambda line: line.pipeline
)
def test_every_pass_is_taken_or_refused_with_a_reason(
    line, model: Program, ids: torch.Tensor, logits: torch.Tensor
) -> None:
    before = model.text()
    if line.pipeline in REFUSED:
        with pytest.raises(GraphoptError, match=REFUSED[line.pipeline]):
            graphopt.optimize(model, line.pipeline, data=[{"input_ids": ids}] * 2)
    else:
        made = graphopt.optimize(model, line.pipeline, data=[{"input_ids": ids}] * 2)
        assert made.report is not None
        entry = made.report.passes[-1]
        assert entry.sites
        assert entry.error is None or entry.error <= 1e-11
        if KVCache not in made.facts and "logits" in made.outputs:
            found = made(input_ids=ids)["logits"]
            assert bool(found.isfinite().all())
            if line.pipeline.startswith(SAME) and "," not in line.pipeline:
                assert relative_error(found, logits) < 1e-4
    assert model.text() == before, "a pass left a trace in the program it was given"


def test_text_with_a_cache_is_that_of_the_program_alone(model: Program, ids: torch.Tensor) -> None:
    row, count = ids[:1, :7], 6
    written = graphopt.generate(model, row, max_new_tokens=count, eos_token_id=None)
    alone = row
    for _ in range(count):
        following = model(input_ids=alone)["logits"][:, -1].argmax(-1, keepdim=True)
        alone = torch.cat([alone, following], 1)
    assert torch.equal(written, alone)


def test_a_shorter_model_is_written_as_a_folder(model: Program, tmp_path: Path) -> None:
    shorter = graphopt.optimize(model, "skip-layers{layers=[11 20]}")
    report = shorter.save_pretrained(tmp_path / "out")
    assert max(report.errors.values()) < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 28
    weights = read_folder(tmp_path / "out")
    assert sum(".27." in name for name in weights.tensors) and not any(
        ".28." in name for name in weights.tensors
    )
