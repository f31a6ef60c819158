"""``graphopt inspect`` of a composite model: its components, and blocks within blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nested_networks

from graphopt.cli.running import run


def test_components_are_shown(tmp_path: Path, capsys: Any) -> None:
    nested_networks.captured("transformer").save(tmp_path / "saved")
    assert run(["inspect", str(tmp_path / "saved"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["components"]) == {"encoder", "decoder"}
    assert found["components"]["decoder"]["takes"] == ["encoder"]
    assert len(found["components"]["encoder"]["blocks"]) == 4
    assert sum("cross" in b["sizes"] for b in found["blocks"]) == 2
    assert run(["inspect", str(tmp_path / "saved")]) == 0
    shown = capsys.readouterr().out
    assert "decoder, features" in shown
    assert "2 attention, 2 ffn" in shown


def test_blocks_within_blocks_are_shown(tmp_path: Path, capsys: Any) -> None:
    nested_networks.captured("stages").save(tmp_path / "saved")
    assert run(["inspect", str(tmp_path / "saved"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"] == {}
    inner = {b["name"]: b["inner"] for b in found["blocks"]}
    assert inner["composite.0"] == ["attention.0", "ffn.0", "attention.1", "ffn.1"]
    assert inner["attention.0"] == []
