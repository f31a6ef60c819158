"""A folder that the library of its method writes, and loads again after a layer was skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from amounts import cases

from benchmarks.quantised_formats import FORMATS, check


@pytest.mark.parametrize(
    "name",
    cases(
        ["pack-4-asymmetric"],
        [n for n, (library, _) in FORMATS.items() if n != "pack-4-asymmetric" and library],
    ),
)
def test_values_are_those_of_the_library_which_loads_what_is_written(name: str, tmp_path: Path) -> None:
    library, write = FORMATS[name]
    pytest.importorskip(library)
    said = check(write, tmp_path)
    assert said.startswith(
        "21 matrices equal; a layer skipped, written: 14 matrices in the layout, reload,"
    ), said
    assert float(said.rpartition(" ")[2]) < 1e-5
