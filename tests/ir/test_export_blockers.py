"""What stands in the way of a folder stays there until the pass that put it there takes it away."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

import graphopt
from graphopt import LoweringError, Program
from graphopt.ir.export_blockers import block_export, export_blockers, unblock_export

ATTACHED = {
    "attach-multi-token-heads{heads=1 layers=1}": "attach-multi-token-heads",
    "attach-early-exit{layers=[0]}": "attach-early-exit",
    "attach-draft": "attach-draft",
}
# what is in the way, and what takes it away again
UNDONE = {
    "llama": ("split-ffn{widths=[1/2 1] score=peak}", "extract-width{width=1}", "split-ffn"),
    "mixtral": ("dial-top-k", "freeze-dial{dial=active_experts value=1}", "dial-top-k"),
}


@pytest.mark.parametrize("attach", ATTACHED)
@pytest.mark.parametrize("name", UNDONE)
@pytest.mark.parametrize("first", [True, False])
def test_attached_outputs_are_never_lost_in_a_folder(
    name: str, attach: str, first: bool, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    done, undone, owner = UNDONE[name]
    before = [attach, done] if first else [done, attach]
    program = graphopt.optimize(captured(name), ", ".join(before))
    assert set(export_blockers(program)) == {owner, ATTACHED[attach]}
    after = graphopt.optimize(program, undone)
    assert set(export_blockers(after)) == {ATTACHED[attach]}
    for made in (program, after):
        with pytest.raises(LoweringError, match=ATTACHED[attach]):
            made.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    program.save(tmp_path / "program")
    assert export_blockers(graphopt.load(tmp_path / "program")) == export_blockers(program)


def test_reasons_are_kept_by_who_gave_them(captured: Callable[[str], Program]) -> None:
    program = captured("llama").copy()
    for order in permutations(("a", "b", "c")):
        other = program.copy()
        for by in order:
            block_export(other, f"reason of {by}", by=by)
            block_export(other, f"reason of {by}", by=by)
        copied = other.copy()
        unblock_export(copied, order[0])
        unblock_export(copied, "nobody")
        assert export_blockers(copied) == {by: (f"reason of {by}",) for by in order[1:]}
        assert set(export_blockers(other)) == set(order), "a copy changed what it was copied from"
    assert export_blockers(program) == {}


def test_a_message_names_every_reason(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured("llama").copy()
    block_export(program, "one thing", by="first-pass")
    block_export(program, "another", by="second-pass")
    with pytest.raises(LoweringError, match=r"one thing \(first-pass\); another \(second-pass\)"):
        program.save_pretrained(tmp_path / "out")
