"""Changes to the structure of a trained model, as checked passes over one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import capture, load, optimize
    from .decoding.answering import answer
    from .decoding.conversation import Conversation
    from .decoding.generation import generate, stream
    from .ir.cost import cost
    from .ir.errors import (
        CaptureError,
        CheckpointError,
        ContractError,
        GraphoptError,
        LoweringError,
        PassRefusedError,
        PipelineError,
        UsageError,
        VerificationError,
    )
    from .ir.program import Program
    from .ir.rewriting.rewrite import rewrite
    from .measure.evaluation import Evaluation, evaluate
    from .measure.oracle import routing_oracle
    from .measure.sweeping import sweep
    from .training.learning import train

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("capture", "load", "optimize"), "graphopt.api"),
    "answer": "graphopt.decoding.answering",
    "Conversation": "graphopt.decoding.conversation",
    "cost": "graphopt.ir.cost",
    "Evaluation": "graphopt.measure.evaluation",
    "evaluate": "graphopt.measure.evaluation",
    "Program": "graphopt.ir.program",
    "rewrite": "graphopt.ir.rewriting.rewrite",
    "generate": "graphopt.decoding.generation",
    "stream": "graphopt.decoding.generation",
    "routing_oracle": "graphopt.measure.oracle",
    "sweep": "graphopt.measure.sweeping",
    "train": "graphopt.training.learning",
    **dict.fromkeys(
        (
            "CaptureError",
            "CheckpointError",
            "ContractError",
            "GraphoptError",
            "LoweringError",
            "PassRefusedError",
            "PipelineError",
            "UsageError",
            "VerificationError",
        ),
        "graphopt.ir.errors",
    ),
}

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ContractError",
    "Conversation",
    "Evaluation",
    "GraphoptError",
    "LoweringError",
    "PassRefusedError",
    "PipelineError",
    "Program",
    "UsageError",
    "VerificationError",
    "__version__",
    "answer",
    "capture",
    "cost",
    "evaluate",
    "generate",
    "load",
    "optimize",
    "rewrite",
    "routing_oracle",
    "stream",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's help must not
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    from importlib import import_module

    if _HOMES[name] != "graphopt.ir.errors":
        # whichever name is used first: models given to it are captured, and programs can be exported
        import_module("graphopt.api")
    return getattr(import_module(_HOMES[name]), name)
