"""The steps of a capture by stamping, each of which says why where it cannot be taken."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...ir.facts import note_capture
from ...ir.program import Program
from ...ir.rewriting.cleanup import order_readers
from .kinds import Choice, choose
from .record import CannotStamp, record
from .rerun import exported_lists, require_same_run
from .shorten import shortened
from .stamp import write_layers
from .tensors import Tensors

Plan = Choice | CannotStamp
"""Which layers are exported and which are stamped, or why all are exported."""


def plan_stamping(
    model: nn.Module, example: Mapping[str, Any], buffers: Mapping[str, torch.Tensor] | None = None
) -> Plan:
    """Return which layers of a model have to be exported.

    Args:
        model: in evaluation mode; run on tensors without values, whole and shortened, and left as it was.
        example: inputs by parameter name.
        buffers: values of the buffers, if the model's own have none.
    """
    try:
        whole = record(model, example, buffers or {})
        choice = choose(whole)
        with shortened(model, choice):
            again = record(model, example, buffers or {}, exported_lists(choice), whole.forms)
        require_same_run(whole, again, choice)
        return choice
    except CannotStamp as reason:
        return reason


def exported_layers(model: nn.Module, plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model has only the layers that are exported."""
    return contextlib.nullcontext() if isinstance(plan, CannotStamp) else shortened(model, plan)


def stamp(program: Program, plan: Plan, tensors: Tensors) -> None:
    """Write the other layers into an exported program, and note how it was captured.

    Raises:
        CannotStamp: the exported layers differ, or the tensors of others do not fit; the program is of no use then.
    """
    if isinstance(plan, CannotStamp):
        note_capture(program, layers=f"all exported: {plan.message}")
        return
    write_layers(program, plan, tensors)
    order_readers(program)
    note_capture(
        program,
        layers=f"{len(plan.exported)} of {len(plan.layers)} exported, of {plan.kinds} kinds; the others copied",
    )
