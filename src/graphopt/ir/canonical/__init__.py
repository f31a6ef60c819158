"""Canonicalisation: one form for each construct, so that every pass is written once.

The guarantees are listed in ``docs/architecture.md``; :func:`canonicalise` establishes them and
records the fact ``canonical``. What was not recognised stays unchanged and is noted in ``program.facts``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compat import refusing_guards
from ..facts import Canonical
from ..rewriting.cleanup import clean, drop_dead, order_readers, settle_sizes, share_constants, share_equal
from ..rewriting.functionalise import functionalise
from .convolutions import recognise_convolutions
from .experts import recognise_experts
from .linears import recognise_linears
from .norms import recognise_norms
from .rotary import recognise_rotary
from .scans import recognise_scans

if TYPE_CHECKING:
    from ..program import Program

__all__ = ["canonicalise", "clean", "drop_dead"]


def canonicalise(program: Program) -> None:
    """Rewrite a captured graph in place into canonical form, in graphopt's operator set.

    Raises:
        CaptureError: an in-place operator cannot be made functional.
        VerificationError: a rule would branch on the example's value of a size that varies.
    """
    with refusing_guards(program.mode):
        _canonicalise(program)
    program.edit.end()
    order_readers(program)
    program.facts.add(Canonical())


def _canonicalise(program: Program) -> None:
    from .attention import recognise_attention

    functionalise(program)
    settle_sizes(program)
    clean(program)
    recognise_convolutions(program)
    recognise_linears(program)
    share_constants(program)
    share_equal(program)
    recognise_norms(program)
    recognise_rotary(program)
    recognise_attention(program)
    recognise_scans(program)
    recognise_experts(program)
    share_equal(program)
    drop_dead(program)
