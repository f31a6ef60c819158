"""Rewrites messages that name Python arguments so that they name command-line flags."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SPELLINGS = (
    (r"say trust=True \(--trust\)", "say --trust"),
    (r"give data= in Python or --data FILE on the command line", "give --data FILE"),
    (r" \((?:against|metrics)=\)", ""),
    (r"say which: against=", "say which: --against ORIGINAL"),
    (r"; in Python, sizes=", ""),
    (r"sizes= gives them; --shape on the command line", "--shape gives them"),
    (r"\(sizes=\)", "(--shape)"),
    (r"with sizes=", "with --shape"),
    (r"\btarget=onnx\b", "--target onnx"),
    (r"\btarget= names", "--target names"),
    (r"\bopset=(\d+)", r"--opset \1"),
    (r"\b(compare=False|tolerance=|float32=True|external_data=True) (writes|accepts|leaves)", r"in Python, \1 \2"),
    (r"pass dynamic= (with|for) the sizes that vary", "in Python, dynamic= names the sizes that vary"),
    (r"give inputs=, e\.g\. a tensor", "in Python, inputs= gives an example"),
    (r"give inputs=, ", "give --inputs FILE.npz, "),
    (r"give inputs= or data", "give --data FILE"),
    (r"use program\.save, program\.lower or program\.exported_program",
     "graphopt optimize keeps it as a program; graphopt lower and graphopt export --to pt2 write it otherwise"),
    (r"use program\.save or program\.lower", "graphopt optimize keeps it as a program, graphopt lower writes it otherwise"),
    (r"program\.operators lists its operators", "graphopt inspect --json lists its operators"),
    (r"graphopt\.optimize\(program, '([a-z-]+)'\) gives", r"graphopt optimize -p \1 gives"),
    (r"save\(\) keeps all ranks", "graphopt optimize keeps all ranks"),
    (r"a \.npz file, or batches of tensors in Python", "a .npz file"),
)  # fmt: skip


def at_the_shell(message: str, flags: Mapping[str, str]) -> str:
    """Return an error message worded for the command line.

    Args:
        message: the error's message, with its hint.
        flags: the command's flags, by the names of its arguments in Python.
    """
    for pattern, spelling in _SPELLINGS:
        message = re.sub(pattern, spelling, message)
    for name, flag in flags.items():
        # a single-word name may be an ordinary word of the sentence
        if "_" in name:
            message = re.sub(rf"(?<![\w\-{{.\"'/]){name}(?![\w.\"'/=])", flag, message)
    return message
