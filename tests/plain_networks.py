"""Modules of plain torch as people write them, with an example of their inputs: for tests of capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Ranking(nn.Module):
    """Click-through: dense features, one bag of categories a table, dot products of all pairs (as in DLRM)."""

    def __init__(self, tables: int = 3, width: int = 8):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width))
        self.tables = nn.ModuleList(nn.Embedding(20, width) for _ in range(tables))
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 16), nn.ReLU(), nn.Linear(16, 1))
        self.register_buffer("rows", torch.tril_indices(tables + 1, tables + 1, -1)[0])
        self.register_buffer("columns", torch.tril_indices(tables + 1, tables + 1, -1)[1])

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        stacked = torch.stack([x, *(t(categories[:, n]) for n, t in enumerate(self.tables))], 1)
        products = stacked @ stacked.transpose(1, 2)
        return self.top(torch.cat([x, products[:, self.rows, self.columns]], 1)).sigmoid()


class Bags(nn.Module):
    """The same with bags of several categories, given as values and where each bag begins."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(20, 8, mode="sum")
        self.bottom, self.top = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, dense: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.top(self.bottom(dense) * self.table(values, offsets))


class Convolution(nn.Module):
    """One step of message passing: the mean over neighbours, by ``index_add`` or ``scatter``."""

    def __init__(self, features: int, width: int, scatter: bool):
        super().__init__()
        self.own, self.others, self.scatter = nn.Linear(features, width), nn.Linear(features, width), scatter

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        source, target = edge_index[0], edge_index[1]
        messages = x[source]
        if self.scatter:
            where = target[:, None].expand_as(messages)
            total = torch.zeros_like(x).scatter_add(0, where, messages)
        else:
            total = torch.zeros_like(x).index_add(0, target, messages)
        degree = torch.zeros(x.shape[0]).index_add(0, target, torch.ones(target.shape[0]))
        return self.own(x) + self.others(total / degree.clamp(min=1)[:, None])


class Graph(nn.Module):
    """Two steps of message passing, then a class for each node."""

    def __init__(self, scatter: bool = False):
        super().__init__()
        self.first, self.second = Convolution(6, 8, scatter), Convolution(8, 4, scatter)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


class Anything(nn.Module):
    """Passes on whatever it is given, as wrappers do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Low(nn.Module):
    """A linear with an adapter of low rank beside it, as PEFT puts in its place."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.scaling = {"default": 0.5}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name, down in self.lora_A.items():
            low = down(self.lora_dropout[name](x.to(down.weight.dtype)))
            result = result + self.lora_B[name](low) * self.scaling[name]
        return result


class Positional(nn.Module):
    """Takes its inputs by position alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor, /, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x) * scale + y


class Mixed(nn.Module):
    """Inputs with a batch, with a batch of one that must stay, and without any."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if table.shape[0] != 1:
            raise ValueError("one table for all rows")
        return self.linear(x) * scale + table[0, : x.shape[1]]


class Pieces(nn.Module):
    """Takes five steps and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 5:
            raise ValueError("five steps")
        return self.mix(x) + x.flip(1)


class Halved(nn.Module):
    """Freezes a length by making a number of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = int(x.shape[1])
        table = torch.arange(float(steps)).tolist()
        return self.linear(x) + torch.tensor(table)[:, None]


class Last(nn.Module):
    """The last state of a recurrent network."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x)[0][:, -1])


def _edges(nodes: int, edges: int) -> torch.Tensor:
    return torch.randint(0, nodes, (2, edges), generator=torch.Generator().manual_seed(0))


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _encoder(**more: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **more), 2)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "transformer": lambda: (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (_r(2, 7, 8), _r(2, 5, 8))),
    "transformer_time_first": lambda: (nn.Transformer(8, 2, 1, 1, 16), (_r(7, 2, 8), _r(5, 2, 8))),
    "transformer_one_row": lambda: (
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        (_r(1, 7, 8), _r(1, 5, 8)),
    ),
    "encoder": lambda: (_encoder(batch_first=True), _r(2, 7, 8)),
    "encoder_time_first": lambda: (_encoder(), _r(7, 2, 8)),
    "encoder_norm_first": lambda: (_encoder(batch_first=True, norm_first=True), _r(2, 7, 8)),
    "encoder_masked": lambda: (
        _encoder(batch_first=True),
        {
            "src": _r(2, 7, 8),
            "src_key_padding_mask": torch.arange(7).expand(2, 7) >= torch.tensor([[7], [5]]),
        },
    ),
    "encoder_layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), _r(2, 7, 8)),
    "decoder_layer": lambda: (
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        (_r(2, 5, 8), _r(2, 7, 8)),
    ),
    "attention": lambda: (
        nn.MultiheadAttention(8, 2, batch_first=True),
        (_r(2, 5, 8), _r(2, 7, 8), _r(2, 7, 8)),
    ),
    "ranking": lambda: (Ranking(), (_r(3, 5), torch.randint(0, 20, (3, 3)))),
    "ranking_one_row": lambda: (Ranking(), (_r(1, 5), torch.randint(0, 20, (1, 3)))),
    "bags": lambda: (Bags(), (_r(3, 5), torch.randint(0, 20, (11,)), torch.tensor([0, 4, 9]))),
    "graph": lambda: (Graph(), (_r(9, 6), _edges(9, 14))),
    "graph_scatter": lambda: (Graph(scatter=True), (_r(9, 6), _edges(9, 14))),
    "anything": lambda: (Anything(Anything(Ranking())), (_r(3, 5), torch.randint(0, 20, (3, 3)))),
    "anything_by_name": lambda: (
        Anything(Ranking()),
        {"dense": _r(3, 5), "categories": torch.randint(0, 20, (3, 3))},
    ),
    "adapter": lambda: (
        Anything(nn.Sequential(Low(nn.Linear(4, 6)), nn.ReLU(), Low(nn.Linear(6, 2)))),
        _r(3, 5, 4),
    ),
    "positional": lambda: (Positional(), (_r(3, 4), _r(3, 4))),
    "compiled": lambda: (torch.compile(Ranking()), (_r(3, 5), torch.randint(0, 20, (3, 3)))),  # type: ignore[list-item]
    "mixed": lambda: (Mixed(), (_r(1, 5, 4), _r(1, 9, 4), _r(4))),
    "pieces": lambda: (Pieces(), _r(2, 5, 4)),
    "halved": lambda: (Halved(), _r(2, 5, 4)),
    "lstm": lambda: (Last(nn.LSTM(4, 6, batch_first=True)), _r(2, 5, 4)),
    "gru": lambda: (Last(nn.GRU(4, 6, batch_first=True)), _r(2, 5, 4)),
    "lstm_two_ways": lambda: (Last(nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)), _r(2, 5, 4)),
    "rnn": lambda: (Last(nn.RNN(4, 6, batch_first=True)), _r(2, 5, 4)),
}
"""By name, what makes a module and an example."""
