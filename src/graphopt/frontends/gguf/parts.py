"""Models in several files, ``NAME-00001-of-00003.gguf`` and so on, as llama.cpp's llama-gguf-split writes them."""

from __future__ import annotations

import re
from pathlib import Path

from ...ir.errors import CheckpointError
from .header import Header, StoredTensor, read_header

_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_headers(path: Path) -> Header:
    """Read the header of a file, and those of the other parts if it is part of a model.

    The first part has the metadata; any of them may be given.

    Raises:
        CheckpointError: a file is damaged, a part is missing, or the parts do not belong together.
    """
    header = read_header(path)
    count = header.count("split.count", 1, low=0)
    if count <= 1:
        return header
    match = _NAME.fullmatch(path.name)
    number = header.count("split.no", low=0)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise header.wrong(
            f"it is part {number + 1} of {count} of a model, and its name does not say so",
            hint=f"call the parts NAME-00001-of-{count:05d}.gguf and so on, or join them with `llama-gguf-split --merge`",
        )
    headers: list[Header] = []
    tensors: dict[str, StoredTensor] = {}
    for index in range(count):
        sibling = path.with_name(f"{match['name']}-{index + 1:05d}-of-{count:05d}.gguf")
        if not sibling.is_file():
            raise CheckpointError(
                f"{path} is part {number + 1} of {count} of a model, and {sibling} does not exist",
                hint="all parts must lie in one folder",
            )
        header_of_part = header if index == number else read_header(sibling)
        if header_of_part.count("split.count") != count or header_of_part.count("split.no", low=0) != index:
            raise header_of_part.wrong(f"it is no part {index + 1} of {count}, as its name says")
        twice = next((name for name in header_of_part.tensors if name in tensors), None)
        if twice is not None:
            raise header_of_part.wrong(f"its tensor {twice!r} is in an earlier part as well")
        tensors.update(header_of_part.tensors)
        headers.append(header_of_part)
    total = headers[0].count("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise headers[0].wrong(f"its model has {total} tensors, and the parts have {len(tensors)}")
    return Header(headers[0].path, headers[0].metadata, tensors)
