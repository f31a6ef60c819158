"""The demo's job on the packaged checkpoint, with the figures it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_main_job_on_the_sentence_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("sentence_encoder", EXAMPLES / "sentence_encoder.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    figures = example.run(tmp_path)
    assert figures["fused_difference"] < 1e-5, "fused projections changed the embeddings"
    assert figures["cosine_1"] > 0.9, "the layer removed was not the least needed"
    assert figures["cosine_2"] > 0.8, "the layers removed were not the least needed"
    assert figures["cosine_1"] > figures["cosine_2"], "removing more cannot cost less here"
    assert figures["ranking_1"] > 0.9, "pairs are ranked otherwise with one layer fewer"
    assert figures["folder_error"] < 1e-5
    assert figures["onnx_error"] < 1e-5
    assert figures["saved_difference"] < 1e-6
    assert "Report" in capsys.readouterr().out
