"""Grouping of the blocks of a stream into repeating layers."""

from __future__ import annotations

from .blocks import Block, Layer, Stream

_POSITIONS = ("attention", "mixer")


def group_layers(stream: Stream) -> list[Layer]:
    """Return the layers of a stream: occurrences of the shortest pattern of blocks that repeats along all of it.

    Blocks that share an addition are never separated. Where nothing repeats, a layer begins at each block that
    mixes positions and follows a feed-forward.
    """
    steps: list[list[Block]] = []
    for block in stream.blocks:
        if steps and steps[-1][0].add is block.add:
            steps[-1].append(block)
        else:
            steps.append([block])
    marks = ["".join(sorted({"T" if b.kind in _POSITIONS else "F" for b in step})) for step in steps]
    for period in range(1, len(steps) // 2 + 1):
        if len(steps) % period == 0 and all(m == marks[i % period] for i, m in enumerate(marks)):
            return [_layer(steps[i : i + period]) for i in range(0, len(steps), period)]
    layers: list[list[list[Block]]] = []
    for step, mark in zip(steps, marks, strict=True):
        has_ffn = bool(layers) and any(b.kind not in _POSITIONS for s in layers[-1] for b in s)
        if not layers or ("T" in mark and (has_ffn or "F" not in "".join(marks))):
            layers.append([])
        layers[-1].append(step)
    return [_layer(layer) for layer in layers]


def _layer(steps: list[list[Block]]) -> Layer:
    return Layer([block for step in steps for block in step])
