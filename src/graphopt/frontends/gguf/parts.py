"""A model in several files, ``NAME-00001-of-00003.gguf`` and so on, as llama.cpp's llama-gguf-split writes it."""

from __future__ import annotations

import re
from pathlib import Path

from ...ir.errors import CheckpointError
from .header import Header, StoredTensor, read_header

_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_headers(path: Path) -> Header:
    """Read the header of a file, and of all parts of a model of which it is one.

    The first part has the metadata; any of them may be given.

    Raises:
        CheckpointError: a file is damaged, a part is missing, or the parts do not belong together.
    """
    given = read_header(path)
    count = given.count("split.count", 1, low=0)
    if count <= 1:
        return given
    found = _NAME.fullmatch(path.name)
    number = given.count("split.no", low=0)
    if found is None or int(found["count"]) != count or int(found["number"]) != number + 1:
        raise given.wrong(
            f"it is part {number + 1} of {count} of a model, and its name does not say so",
            hint=f"call the parts NAME-00001-of-{count:05d}.gguf and so on, or join them with `llama-gguf-split --merge`",
        )
    parts: list[Header] = []
    tensors: dict[str, StoredTensor] = {}
    for index in range(count):
        place = path.with_name(f"{found['name']}-{index + 1:05d}-of-{count:05d}.gguf")
        if not place.is_file():
            raise CheckpointError(
                f"{path} is part {number + 1} of {count} of a model, and {place} does not exist",
                hint="all parts must lie in one folder",
            )
        part = given if index == number else read_header(place)
        if part.count("split.count") != count or part.count("split.no", low=0) != index:
            raise part.wrong(f"it is no part {index + 1} of {count}, as its name says")
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise part.wrong(f"its tensor {twice!r} is in an earlier part as well")
        tensors.update(part.tensors)
        parts.append(part)
    total = parts[0].count("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise parts[0].wrong(f"its model has {total} tensors, and the parts have {len(tensors)}")
    return Header(parts[0].path, parts[0].metadata, tensors)
