"""Errors that say what failed, where, why, and what to do next."""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of every error graphopt raises on purpose.

    ``exit_code`` is the status the command line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, *, node: str | None = None, source: str | None = None, hint: str = ""):
        self.message = message
        self.node = node
        self.source = source
        self.hint = hint
        where = ""
        if node:
            where += f"\n  at node: {node}"
        if source:
            where += f"\n  in the model: {source}"
        if hint:
            where += f"\n  what to do: {hint}"
        super().__init__(message + where)


class CaptureError(GraphoptError):
    """A model could not be captured, or the captured graph does not compute what the model computes."""

    exit_code = 3


class CheckpointError(GraphoptError):
    """A checkpoint or a saved program cannot be read, or must not be."""

    exit_code = 3


class UsageError(GraphoptError):
    """Wrong arguments: an unknown option, a missing input, a value out of range."""

    exit_code = 2


class PipelineError(UsageError):
    """The text of a pipeline or a plan is wrong, or its passes cannot run in that order."""


class PassRefusedError(GraphoptError):
    """A pass cannot be applied to the program, or found no site."""

    exit_code = 4


class ContractError(GraphoptError):
    """A pass changed more than its contract allows."""

    exit_code = 5


class VerificationError(GraphoptError):
    """A graph breaks the rules of the intermediate representation."""

    exit_code = 5


class LoweringError(GraphoptError):
    """A program cannot be written in the requested format."""

    exit_code = 4


class DistributedError(GraphoptError):
    """A distributed run failed: a rank ended, hung, or computed other values than the others."""

    exit_code = 1
