"""Folders of architectures with real settings; all of them with GRAPHOPT_THOROUGH=1, or by benchmarks/real_settings.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_settings
import zoo
from amounts import THOROUGH

SKIP, PRUNE = "skip-layers{layers=[1]}", "prune-experts{keep=2 score=random}"
ALL = [(n, SKIP, short) for n in zoo.CASES for short in (False, True)] + [
    (n, PRUNE, False) for n, case in zoo.CASES.items() if case.blocks.get("experts")
]
FEW = [("mistral", SKIP, False), ("gemma2", SKIP, True), ("qwen2_moe", PRUNE, False)]


@pytest.mark.parametrize(("name", "passes", "short"), ALL if THOROUGH else FEW)
def test_a_folder_with_real_settings_is_right_or_refused(
    name: str, passes: str, short: bool, tmp_path: Path
) -> None:
    found = real_settings.outcome(name, passes, tmp_path, short=short)
    if found is None:
        pytest.skip("this pass, or a short window, does not apply to it")
    assert found.verdict in ("right", "refused"), found.told
    if (name, passes, short) in FEW:
        assert found.verdict == "right", found.told
