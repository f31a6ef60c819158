"""Export of a decoder with caches to a folder for onnxruntime-genai."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from ...ir.errors import LoweringError
from ...ir.facts import Quantized
from ...ir.program import Program
from ...ir.vocabulary import kept_tokens
from .genai_folder import compare, genai_config, installed, write_beside
from .lower import Operators, lower_onnx
from .model import OnnxReport


@dataclass(frozen=True)
class GenaiReport:
    """What was written.

    Attributes:
        path: the folder.
        model: of the file in it.
        files: in the folder.
        compared: how many of onnxruntime-genai's tokens are the program's most likely ones too; None if it is not
            installed.
    """

    path: Path
    model: OnnxReport
    files: tuple[Path, ...]
    compared: int | None


def lower_genai(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    float32: bool = True,
    check: bool = False,
    tolerance: float | None = None,
    operators: Operators | None = None,
    float_products: bool = False,
) -> GenaiReport:
    """Write model.onnx, genai_config.json and the tokenizer's files into a new folder.

    Caches are inputs and outputs that share a buffer in genai (``past_present_share_buffer``). If onnxruntime-genai
    is installed, its tokens are compared with the program's.

    Args:
        program: after insert-cache.
        path: of the folder, which must not exist.
        opset: see :func:`lower_onnx`.
        float32: the same.
        check: raise an error if onnxruntime-genai is not installed.
        tolerance: see :func:`lower_onnx`.
        operators: the same; by default "runtime", and "standard" for values that are rounded between operators.
        float_products: see :func:`lower_onnx`.

    Raises:
        LoweringError: the program has no caches, or caches that genai cannot make; the tokens differ; what
            :func:`lower_onnx` raises.
    """
    if kept_tokens(program, "logits") is not None:
        raise LoweringError(
            "the program's logits are of some tokens, and genai takes their places for tokens",
            hint="lower it without trim-vocabulary; graphopt generate maps them back",
        )
    destination = Path(path).absolute()
    if destination.exists():
        raise LoweringError(f"{destination} exists already", hint="choose another place, or remove it")
    if not destination.parent.is_dir():
        raise LoweringError(f"the folder {destination.parent} does not exist")
    if check and not installed():
        raise LoweringError(
            "the check generates with onnxruntime-genai", hint='pip install "graphopt[genai]"'
        )
    config = genai_config(program)
    if operators is None:
        operators = "standard" if Quantized in program.facts else "runtime"
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as name:
        draft = Path(name) / destination.name
        draft.mkdir()
        model = lower_onnx(
            program, draft / "model.onnx", opset=opset, dynamic=True, float32=float32, tolerance=tolerance,
            operators=operators, float_products=float_products,
        )  # fmt: skip
        write_beside(program, draft, config)
        rounded = model.kernels is not None and model.kernels.rounding is not None
        compared = compare(program, draft, behind=0.2 if rounded else 2e-2) if installed() else None
        files = tuple(destination / f.name for f in sorted(draft.iterdir()))
        os.replace(draft, destination)
    moved = replace(
        model, path=destination / "model.onnx", files=tuple(destination / f.name for f in model.files)
    )
    return GenaiReport(destination, moved, files, compared)
