"""What the examples that measure share: numbers by name, kept after each, and models to measure."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import graphopt
from graphopt.ir.running.retype import retyped

HERE = Path(__file__).parent
MODELS = HERE / "reference_models"
DATA = MODELS / "data"
CALIBRATION, JUDGED, TRAINING = (DATA / f"{n}.jsonl" for n in ("calibration", "validation", "train"))


if not all(path.is_file() for path in (CALIBRATION, JUDGED, TRAINING)):
    print(f"the text is not there yet: python {MODELS / 'corpus.py'} makes it in {DATA}", file=sys.stderr)


class Results:
    """Numbers by name, kept after each so that nothing is measured twice."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a number, measured if it is not known."""
        if key not in self.rows:
            began = time.perf_counter()
            self.rows[key] = measure()
            self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
            Console().print(f"{key}: {self.rows[key]} ({time.perf_counter() - began:.0f} s)")
        return self.rows[key]


def reference_model(name: str) -> graphopt.Program:
    """Return a reference model in float32."""
    return retyped(graphopt.capture(MODELS / "models" / name), torch.float32)


def perplexity(program: graphopt.Program, sequences: int) -> float:
    """Return the perplexity on validation text, in rows of 256 tokens."""
    found = graphopt.evaluate(program, JUDGED, "perplexity", sequences=sequences, length=256)
    return round(found.values["perplexity"], 4)


def calibration(program: graphopt.Program, sequences: int) -> Any:
    """Return calibration batches; passes use the first half of them."""
    from graphopt.data.reading import read_data

    return read_data(program, CALIBRATION, sequences=2 * sequences, length=256)[0]
