"""Loops over the experts that were hit, as loops over all experts while a model is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode


class _Expert(int):
    """The index of an expert, known while tracing, where the model has a tensor with one element."""

    def item(self) -> int:
        return int(self)


class _Hit(list[_Expert]):
    """A row of ``nonzero`` of a vector: the index of one expert."""

    def item(self) -> int:
        return int(self[0])

    def __int__(self) -> int:
        return int(self[0])

    __index__ = __int__


@dataclass
class _Table:
    """Choices as ones of integers (experts, k, tokens).

    Attributes:
        values: kept, so that its id is not reused.
        distinct: a token chooses an expert at most once.
        absent: places of the table that no expert has.
    """

    values: torch.Tensor
    distinct: bool
    absent: set[int]


@dataclass
class _Tokens:
    """The tokens of one expert: indices of all of them, k times if they may choose it as often, and which it has."""

    indices: torch.Tensor
    chosen: torch.Tensor
    times: int
    table: _Table
    expert: int


class ExpertLoops(TorchFunctionMode):
    """Let every expert compute on every token where a model loops over the experts that its tokens chose.

    Such a loop begins with the choices as ones in a table (experts, k, tokens), of which the experts with any are
    found by ``sum``, ``greater`` and ``nonzero``; the tokens of one expert are those at which ``where`` finds a one,
    and its results go to them by ``index_add_``. Both are of unknown number. Here all experts are met, each with all
    tokens in order, and what it adds is 0 for tokens that did not choose it. Tokens used in any other way are refused.
    """

    def __init__(self) -> None:
        super().__init__()
        # by id; the tensors are kept, so that their ids are not reused
        self.distinct: dict[int, torch.Tensor] = {}
        self.tables: dict[int, _Table] = {}
        self.counts: dict[int, tuple[torch.Tensor, _Table]] = {}
        self.parts: dict[int, tuple[torch.Tensor, _Table, int]] = {}
        self.tokens: dict[int, _Tokens] = {}
        self.running: _Table | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func in (torch.topk, torch.Tensor.topk):
            result = func(*args, **kwargs)
            self.distinct[id(result[1])] = result[1]
            return result
        if func in (one_hot, torch.Tensor.permute) and id(first) in self.distinct:
            result = func(*args, **kwargs)
            self.distinct[id(result)] = result
            return result
        if func is torch.Tensor.sum and _is_table(first) and _over_choices(args[1:], kwargs):
            count = func(*args, **kwargs)
            table = _Table(first, id(first) in self.distinct or first.shape[1] == 1, set())
            self.tables[id(first)] = table
            self.counts[id(count)] = count, table
            return count
        if not self.tables:
            return func(*args, **kwargs)
        if id(first) in self.counts:
            table = self.counts[id(first)][1]
            if func in _MORE and len(args) == 2 and isinstance(args[1], int) and args[1] == 0:
                hit = func(*args, **kwargs)
                self.counts[id(hit)] = hit, table
                return hit
            if func in (torch.nonzero, torch.Tensor.nonzero) and not kwargs.get("as_tuple"):
                self.running = table
                return [_Hit([_Expert(i)]) for i in range(int(first.shape[0]))]
        if func is torch.Tensor.__getitem__ and isinstance(args[1], (int, _Hit)) and self.running is not None:
            return self._of_expert(first, args[1], self.running)
        if id(first) in self.parts:
            _, table, expert = self.parts[id(first)]
            if func is torch.Tensor.squeeze:
                return self._part(func(*args, **kwargs), table, expert)
            if func is torch.where and len(args) == 1 and first.dim() == 2:
                return self._tokens_of(first, table, expert)
        if func is torch.Tensor.__getitem__:
            batch = isinstance(args[1], tuple) and len(args[1]) == 2 and args[1][0] is None
            rows = args[1][1] if batch else args[1]
            if self._is_tokens(rows) and self.tokens[id(rows)].times == 1:
                return first.unsqueeze(0) if batch else first
        if func is torch.Tensor.index_add_ and len(args) == 4 and args[1] == 0 and self._is_tokens(args[2]):
            return _added(first, self.tokens[id(args[2])], args[3])
        # what is asked of a tensor's type and shape is asked by getters
        known = func in _KNOWN or getattr(func, "__name__", "") == "__get__"
        if not known and any(self._is_tokens(value) for value in (*args, *kwargs.values())):
            raise RuntimeError(f"{func} of the tokens that chose an expert, whose number is unknown")
        return func(*args, **kwargs)

    def _of_expert(self, values: torch.Tensor, index: int | _Hit, running: _Table) -> torch.Tensor:
        expert = int(index)
        if isinstance(index, (_Expert, _Hit)) and expert == values.shape[0]:
            running.absent.add(expert)
            expert -= 1
        part = values[expert : expert + 1] if isinstance(index, _Hit) else values[expert]
        return self._part(part, running, expert) if values is running.values else part

    def _part(self, part: torch.Tensor, table: _Table, expert: int) -> torch.Tensor:
        self.parts[id(part)] = part, table, expert
        return part

    def _tokens_of(self, part: torch.Tensor, table: _Table, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return of every token the place of the expert among its choices, and its own index."""
        choices, count = int(part.shape[0]), part.shape[1]
        tokens = torch.arange(count, device=part.device)
        if table.distinct:
            self.tokens[id(tokens)] = _Tokens(tokens, part.sum(0) > 0, 1, table, expert)
            return part.argmax(0), tokens
        places = torch.arange(choices, device=part.device).unsqueeze(1).expand(choices, count).reshape(-1)
        tokens = tokens.repeat(choices)
        self.tokens[id(tokens)] = _Tokens(tokens, part.reshape(-1) > 0, choices, table, expert)
        return places, tokens

    def _is_tokens(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self.tokens


def _added(total: torch.Tensor, tokens: _Tokens, rows: torch.Tensor) -> torch.Tensor:
    if tokens.expert in tokens.table.absent:
        return total
    added = torch.where(tokens.chosen.unsqueeze(-1), rows, torch.zeros_like(rows))
    if tokens.times > 1:
        added = added.reshape(tokens.times, -1, *added.shape[1:]).sum(0)
    return total.add_(added)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 3
        and not value.dtype.is_floating_point
        and isinstance(value.shape[0], int)
        and isinstance(value.shape[1], int)
    )


def _over_choices(args: Any, kwargs: Any) -> bool:
    dims = kwargs.get("dim", args[0] if args else None)
    return isinstance(dims, (tuple, list)) and {d % 3 for d in dims} == {1, 2}


_MORE = (torch.greater, torch.gt, torch.Tensor.greater, torch.Tensor.gt, torch.Tensor.__gt__)
_KNOWN = (torch.Tensor.__getitem__, torch.Tensor.numel, torch.Tensor.size, torch.Tensor.dim)
