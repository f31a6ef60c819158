"""The intermediate representation: programs, their anatomy, matching, rewriting, checking and cost."""

from __future__ import annotations

# what each registers as a method of programs, or of their editors
from . import anatomy as anatomy
from . import operators as operators
from .anatomy import removing as removing
from .checking import taking_parts as taking_parts
from .rewriting import stamping as stamping
from .running import execute as execute
