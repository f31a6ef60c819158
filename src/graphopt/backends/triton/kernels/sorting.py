"""Sorting rows by group into blocks that each belong to one group."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_blocks(chosen: Tensor, groups: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort rows by group and pad each group to whole blocks, without synchronising with the device.

    Args:
        chosen: (rows,), integers: each row's group; rows outside 0 to ``groups`` - 1 are dropped.
        groups: how many.
        block: rows a block.

    Returns:
        (blocks * block,) the row at each position, -1 at unused ones; (blocks,) the group of each block, ``groups``
        for unused blocks. There are as many blocks as the worst case needs.
    """
    rows = chosen.shape[0]
    valid = torch.where((chosen >= 0) & (chosen < groups), chosen, groups).to(torch.int64)
    order = torch.argsort(valid, stable=True)
    number = torch.arange(groups + 1, device=chosen.device)
    counts = (valid[:, None] == number).sum(0)
    padded = (counts + block - 1) // block * block
    starts, padded_starts = counts.cumsum(0) - counts, padded.cumsum(0) - padded
    group = valid[order]
    positions = padded_starts[group] + torch.arange(rows, device=chosen.device) - starts[group]
    # each group may leave most of a block empty, including the group of dropped rows
    blocks = (rows + block - 1) // block + groups + 1
    rows_by_position = torch.full((blocks * block,), -1, dtype=torch.int32, device=chosen.device)
    rows_by_position = rows_by_position.scatter(0, positions, order.to(torch.int32))
    ends = padded[:groups].cumsum(0)
    belongs = torch.searchsorted(ends, torch.arange(blocks, device=chosen.device) * block, right=True)
    return rows_by_position, belongs.to(torch.int32)
