"""What synchronisations cost: formulas, links fitted to times, and what a program sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

import graphopt
from graphopt.ir.cost import all_reduce, communication, find_link, ring, star
from graphopt.ir.cost.collectives import Link
from graphopt.ir.cost.link_fit import fit, write_link
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program


@given(st.floats(1e-7, 1e-3), st.floats(1e6, 1e12), st.integers(2, 16))
@settings(max_examples=40, deadline=None)
def test_fit_finds_the_link_that_made_the_times(latency: float, bandwidth: float, ranks: int) -> None:
    link = Link("true", bandwidth, latency)
    points = [(1 << k, ring(1 << k, ranks, link)) for k in range(8, 30, 2)]
    found = fit(points, ranks)
    assert found.latency == pytest.approx(latency, rel=1e-4)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-4)


def test_fit_never_gives_negative_numbers() -> None:
    noisy = fit([(1000, 5e-4), (100_000, 4e-4), (1_000_000, 4.5e-4)], 2)
    assert noisy.latency >= 0
    assert noisy.bandwidth > 0
    with pytest.raises(UsageError, match="at least two message sizes"):
        fit([(1000, 1e-4)], 2)


@given(st.integers(2, 64), st.floats(1, 1e9))
def test_star_wins_where_latency_rules(ranks: int, size: float) -> None:
    """tau (N - 2) > (N - 1)^2 / N * M / B, from TPI-LLM."""
    link = Link("l", 1e9, 1e-4)
    wins = link.latency * (ranks - 2) > (ranks - 1) ** 2 / ranks * size / link.bandwidth
    assert (star(size, ranks, link) < ring(size, ranks, link)) == wins or abs(
        star(size, ranks, link) - ring(size, ranks, link)
    ) < 1e-12
    assert star(size, 1, link) == 0.0
    assert all_reduce(size, ranks, link)[1] <= star(size, ranks, link)


def test_links_in_files(tmp_path: Path, told: Callable[..., Any]) -> None:
    path = tmp_path / "ours.json"
    write_link(Link("ours", 1.5e9, 2e-4, note="measured"), path)
    found = find_link(str(path))
    assert (found.bandwidth, found.latency) == (1.5e9, 2e-4)
    path.write_text('{"bandwidth": "fast"}')
    with pytest.raises(UsageError, match="is no link"):
        find_link(str(path))
    assert "nvlink" in told("links")
    assert "only one is running" in told("links", "--fit", status=2)["message"]


def test_what_a_program_sends(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    assert communication(program) == []
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=4}")
    link = find_link("nvlink")
    syncs = communication(sharded, link, {"batch": 2, "sequence": 10})
    size = 2 * 10 * 32 * 4
    assert [s.message for s in syncs] == [size] * 4
    assert all(s.sent == 2 * 3 * size // 4 for s in syncs)
    assert all(s.seconds == all_reduce(size, 4, link)[1] for s in syncs)
    dropped = graphopt.optimize(sharded, "drop-sync-points{fraction=1}")
    before, after = dropped.report.passes[-1].change["sent_bytes"]
    assert after == before / 2
    rings = communication(sharded, link, {"batch": 2, "sequence": 10}, algorithm="ring")
    assert rings[0].seconds == ring(size, 4, link)


def test_text_is_continued_as_transformers_does(
    captured: Callable[[str], Program], checkpoint: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    ids = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    program = captured("llama")
    assert torch.equal(graphopt.generate(program, ids, max_new_tokens=8), expected)
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=2}")
    assert torch.equal(graphopt.generate(sharded, ids, max_new_tokens=8), expected)
    stop = int(expected[0, 7])
    short = graphopt.generate(program, ids, max_new_tokens=8, eos_token_id=stop)
    assert int(short[0, -1]) == stop
    assert short.shape[1] <= 8
    drawn = [graphopt.generate(program, ids, max_new_tokens=6, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(UsageError, match="at least one token"):
        graphopt.generate(program, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)


def test_a_prompt_on_the_command_line(told: Callable[..., Any]) -> None:
    model = ROOT / "examples" / "reference_models" / "models" / "draft"
    found = told("generate", model, "--prompt", "The array", "--max-new-tokens", 6)
    assert len(found["tokens"]) == 6
    assert found["text"]


def test_sharded_programs_are_not_lowered(captured: Callable[[str], Program], tmp_path: Path) -> None:
    from graphopt.ir.errors import LoweringError

    sharded = graphopt.optimize(captured("llama"), "shard-tensor-parallel{size=2}")
    with pytest.raises(LoweringError, match="for 2 ranks"):
        sharded.lower("onnx", tmp_path / "x.onnx")
    with pytest.raises(LoweringError, match="for 2 ranks"):
        sharded.exported_program()
    assert not list(tmp_path.iterdir())
