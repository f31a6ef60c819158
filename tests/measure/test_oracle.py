"""The oracle's numbers are those of running every path; its report and the sweep's on the command line."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.cli.running import run
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program
from graphopt.measure.choices import with_choices_as_input
from graphopt.measure.context import Context
from graphopt.measure.paths import Paths


def token_rows(count: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    made = [
        torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(s)) for s in range(count)
    ]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in made]


def split(captured: Callable[[str], Program], name: str, text: str) -> Program:
    program = captured(name)
    return graphopt.optimize(program, f"split-ffn{{score=peak {text}}}")


@pytest.mark.parametrize(
    ("name", "text", "ways"),
    [("llama", "widths=[1/4 1] separate=true skip=true", 3), ("mistral", "", 4), ("falcon_alibi", "widths=[1/4 1]", 2),
     ("gpt2", "widths=[1/4 1]", 2), ("gemma2", "widths=[1/2 1]", 2)],
)  # fmt: skip
def test_every_path_costs_what_running_it_costs(
    name: str, text: str, ways: int, captured: Callable[[str], Program]
) -> None:
    """With windows, rotary and learned positions, position biases; in one piece and piece by piece."""
    program = split(captured, name, text)
    form = with_choices_as_input(program)
    (row,) = token_rows(1)
    layers = len(program.anatomy.ffn)
    position, following = 9, int(row["input_ids"][0, 10])
    routing = torch.full((layers, 1, 12), ways - 1)
    context = Context(token_rows(1))
    losses = None
    for at_once in (1024, ways):
        paths = Paths(form, layers, ways, ways - 1, at_once)
        paths.begin(context.bound(form, {**row, "routing": routing}))
        found, taken = paths.losses(position, following, None)
        assert sorted(map(tuple, taken.tolist())) == sorted(itertools.product(range(ways), repeat=layers))
        by_path = dict(zip(map(tuple, taken.tolist()), found.tolist(), strict=True))
        assert losses is None or all(abs(losses[p] - v) < 1e-5 for p, v in by_path.items())
        losses = by_path
    for path, loss in losses.items():
        one = routing.clone()
        one[:, 0, position] = torch.tensor(path)
        logits = form(**context.bound(form, {**row, "routing": one}))["logits"][0, position]
        assert float(-logits.double().log_softmax(-1)[following]) == pytest.approx(loss, abs=1e-5)


def test_more_paths_are_never_worse_and_budgets_are_kept(captured: Callable[[str], Program]) -> None:
    two = split(captured, "llama", "widths=[1/4 1] separate=true")
    three = split(captured, "llama", "widths=[1/4 1] separate=true skip=true")
    small = graphopt.routing_oracle(two, token_rows(), tokens=4)
    large = graphopt.routing_oracle(three, token_rows(), tokens=4)
    for a, b in zip(small.tokens, large.tokens, strict=True):
        assert (a.row, a.position) == (b.row, b.position)
        assert b.best <= a.best + 1e-6
        assert a.all_largest == pytest.approx(b.all_largest, abs=1e-6)
        assert a.difficulty >= -1e-6
        assert a.best == min(a.exactly.values())
    for budget in range(3):
        report = graphopt.routing_oracle(two, token_rows(), tokens=4, budget=budget)
        assert list(report.exactly) == [budget]
        assert report.exactly[budget] == pytest.approx(small.exactly[budget], abs=1e-6)
    with pytest.raises(UsageError, match="budget of 3"):
        graphopt.routing_oracle(two, token_rows(), budget=3)
    with pytest.raises(UsageError, match="split-ffn first"):
        graphopt.routing_oracle(captured("llama"), token_rows())


def test_rows_of_a_batch_are_tried_one_by_one(captured: Callable[[str], Program]) -> None:
    """As many rows as paths would otherwise be taken for paths."""
    program = split(captured, "llama", "widths=[1/4 1]")
    one_by_one = graphopt.routing_oracle(program, token_rows(2), tokens=6)
    together = [{n: torch.cat([a[n], b[n]]) for n in a} for a, b in [token_rows(2)]]
    assert graphopt.routing_oracle(program, together, tokens=6).tokens == one_by_one.tokens


@pytest.fixture(scope="module")
def dialled(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = graphopt.optimize(graphopt.load(saved("llama")), "split-ffn{score=peak widths=[1/4 1]}")
    return done.save(tmp_path_factory.mktemp("dialled") / "program")


def test_commands_on_a_dial(
    dialled: Path, rows: Path, tmp_path: Path, told: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    table, picture = tmp_path / "table.csv", tmp_path / "picture.svg"
    common = ["--data", str(rows), "--length", "16", "--sequences", "4"]
    assert run(["sweep", str(dialled), *common, "--values", "0 0.5 1", "--metric", "perplexity", "--metric", "kl",
                "--csv", str(table), "--picture", str(picture), "--json", "--work-dir", str(tmp_path / "w")]) == 0  # fmt: skip
    points = json.loads(capsys.readouterr().out)
    assert [p["setting"] for p in points] == [0, 0.5, 1]
    assert points[-1]["share"] == 1.0
    assert points[0]["share"] == pytest.approx(0.25)
    assert points[-1]["values"]["kl"] == pytest.approx(0, abs=1e-9)
    assert points[0]["flops"] < points[-1]["flops"]
    written = list(csv.reader(table.open()))
    assert written[0] == ["delta", "perplexity", "kl", "flops_a_token", "share"]
    assert [float(line[0]) for line in written[1:]] == [0, 0.5, 1]
    assert picture.read_text().lstrip().startswith("<?xml")
    # a comparison with another original is another sweep
    program = graphopt.load(dialled)
    half = graphopt.optimize(program, "freeze-dial{value=0}")
    given = [{"input_ids": torch.randint(3, 100, (2, 9))}]
    kept = {"work_dir": tmp_path / "k", "metrics": ["kl"], "settings": [1.0]}
    (same,), (other,) = (graphopt.sweep(program, given, against=a, **kept) for a in (program, half))
    assert same.values["kl"] < 1e-9 < other.values["kl"]
    # what was measured is not measured again
    assert len(list((tmp_path / "w").glob("sweep-*.json"))) == 1
    assert (
        run(["oracle", str(dialled), "--data", str(rows), "--length", "16", "--tokens", "2", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert set(found["exactly"]) == {"0", "1", "2"}
    assert found["best"] <= found["all_largest"]
    assert run(["oracle", str(dialled), "--data", str(rows), "--length", "16", "--tokens", "2"]) == 0
    assert "at their largest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--values", "0 2"], "cannot be 2"),
        (["--values", "half"], "takes numbers"),
        (["--dial", "sigma"], "it has delta"),
        (["--metric", "beauty"], "no metric 'beauty'"),
        (["--picture", "x.nonsense"], "nonsense"),
    ],
)
def test_wrong_sweeps_are_explained(
    arguments: list[str], reason: str, dialled: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(rows), "--length", "16", "--sequences", "2", "--points", "2"]
    assert run(["sweep", str(dialled), *common, *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_program_without_a_dial_is_not_swept(
    whole: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", str(whole), "--data", str(rows)]) == 2
    assert "no run-time setting" in capsys.readouterr().err
