"""Attentions that read another layer's keys and values, trained one by one to write what they wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import Shape, Transformer, tokens

import graphopt
from graphopt.ir.errors import PassRefusedError, UsageError
from graphopt.ir.program import Program
from graphopt.passes import ShareCaches
from graphopt.training import Settings
from graphopt.training.cache_distillation import distil_shared_caches


def data(count: int) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 12, seed=number) for number in range(count)]


def loss(program: Program, of: Program) -> float:
    """Return the mean square of what logits are apart, on data that nothing was trained on."""
    total = 0.0
    for batch in data(12)[8:]:
        with torch.no_grad():
            a, b = (p(**batch)["logits"] for p in (program, of))
        total += float((a - b).square().mean())
    return total / 4


@pytest.mark.parametrize("options", [{"start": 2}, {"groups": 2}])
@pytest.mark.parametrize("qkv", ["separate", "plain"])
def test_attentions_learn_to_work_with_keys_of_others(
    options: dict[str, int], qkv: str, tmp_path: Path
) -> None:
    """Less is lost than by the fits alone; other weights, and the original, are as they were; an interrupted run goes on."""
    program = graphopt.capture(
        Transformer(Shape(layers=4, rotary=True, qkv=qkv, kv_heads=2), seed=3), tokens(2, 12)
    )
    before = program.text()
    step = ShareCaches(**options)
    fitted = graphopt.optimize(program, [step], data=data(8))
    trained, records = distil_shared_caches(
        program, step, data(8), Settings(steps=60, learning_rate=3e-3), work_dir=tmp_path,
    )  # fmt: skip
    assert program.text() == before
    followers = ["attention.2", "attention.3"] if "start" in options else ["attention.1", "attention.3"]
    assert list(records) == followers
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", *followers}
    for record in records.values():
        assert record.losses[-1] < record.losses[0]
    assert loss(trained, program) < 0.95 * loss(fitted, program)
    assert trained.text() == fitted.text()
    changed = {
        name for name, weight in trained.weights.items()
        if not torch.equal(weight.source.load(), fitted.weights[name].source.load())
    }  # fmt: skip
    assert changed
    assert all(any(f"blocks_{name.partition('.')[2]}_" in weight for name in followers) for weight in changed)
    keys = {block.parts["core"].args[1] for block in trained.anatomy.attention}
    assert len(keys) == 2
    again, _ = distil_shared_caches(
        program, step, data(8), Settings(steps=60, learning_rate=3e-3), work_dir=tmp_path
    )
    for name, weight in again.weights.items():
        assert torch.equal(weight.source.load(), trained.weights[name].source.load())


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    program = graphopt.capture(Transformer(Shape(layers=4), seed=3), tokens(2, 12))
    settings = Settings(steps=2)
    distil_shared_caches(program, ShareCaches(start=2), data(2), settings, work_dir=tmp_path)
    for step, rows, reason in (
        (ShareCaches(groups=2), data(2), "another student"), (ShareCaches(start=2, fit=False), data(2), "another student"),
        (ShareCaches(start=2), data(3), "another data"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            distil_shared_caches(program, step, rows, settings, work_dir=tmp_path)
    with pytest.raises(UsageError, match="no data to train on"):
        distil_shared_caches(program, ShareCaches(start=2, fit=False), [], settings)


def test_nothing_to_share_is_refused() -> None:
    program = graphopt.capture(Transformer(Shape(layers=1)), tokens(2, 12))
    with pytest.raises(PassRefusedError, match="share-caches"):
        distil_shared_caches(program, ShareCaches(), data(2), Settings(steps=1))
