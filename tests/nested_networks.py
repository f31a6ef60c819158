"""Networks whose residual blocks lie inside one another or beside one another, and other plain torch networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphopt

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """Attention of (batch, sequence, 32) over itself, or over another sequence."""

    def __init__(self, width: int = WIDTH, causal: bool = False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.causal = causal

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        source = x if context is None else context
        q, k, v = (
            f(s).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, s in ((self.q, x), (self.k, source), (self.v, source))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, width: int = WIDTH):
        super().__init__(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention, attention over a context where there is one, and a feed-forward."""

    def __init__(self, width: int = WIDTH, cross: bool = False, causal: bool = False):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, causal), FeedForward(width)
        self.cross = Attention(width) if cross else None

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), context)
        return x + self.ffn(self.norm2(x))


class ResidualConvolutions(nn.Module):
    """Two convolutions with an embedding of time added in between, and a shortcut."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, out)
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(WIDTH, out)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialTransformer(nn.Module):
    """A residual block over pixels whose branch is a stream of its own, of transformer blocks."""

    def __init__(self, depth: int = 1):
        super().__init__()
        self.norm, self.inward, self.outward = (
            nn.GroupNorm(4, WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 1),
            nn.Conv2d(WIDTH, WIDTH, 1),
        )
        self.blocks = nn.ModuleList(TransformerBlock(cross=True) for _ in range(depth))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.inward(self.norm(x))
        height, width = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, context)
        return x + self.outward(h.transpose(1, 2).unflatten(-1, (height, width)))


class UNet(nn.Module):
    """A conditional UNet in the shape of Stable Diffusion's, with one level down and up again."""

    def __init__(self, additive: bool = False):
        super().__init__()
        self.additive = additive
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.first = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.res_down, self.attn_down = ResidualConvolutions(WIDTH, WIDTH), SpatialTransformer()
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.res_middle, self.attn_middle = ResidualConvolutions(WIDTH, WIDTH), SpatialTransformer(2)
        self.up = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.res_up = ResidualConvolutions(WIDTH if additive else 2 * WIDTH, WIDTH)
        self.attn_up = SpatialTransformer()
        self.last = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        time = self.time(time)
        x = self.attn_down(self.res_down(self.first(sample), time), context)
        h = self.attn_middle(self.res_middle(self.down(x), time), context)
        h = self.up(F.interpolate(h, scale_factor=2.0))
        h = h + x if self.additive else torch.cat([h, x], 1)
        return self.last(self.attn_up(self.res_up(h, time), context))


class DiT(nn.Module):
    """Transformer blocks whose norms and contributions are scaled by a condition."""

    class Block(nn.Module):
        """Attention and a feed-forward, modulated."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
            self.attention, self.ffn = Attention(), FeedForward()
            self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            a, b, g, d, e, h = self.modulation(F.silu(c))[:, None].chunk(6, -1)
            x = x + g * self.attention(self.norm1(x) * (1 + a) + b)
            return x + h * self.ffn(self.norm2(x) * (1 + d) + e)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.condition = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(DiT.Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, 16)

    def forward(self, latent: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x, c = self.patches(latent).flatten(2).transpose(1, 2), self.condition(time)
        for block in self.blocks:
            x = block(x, c)
        return self.last(x)


class Flux(nn.Module):
    """Two streams that attend to one another, then one stream of attention and feed-forward in parallel."""

    class Double(nn.Module):
        """Image and text with weights of their own and one attention over both."""

        def __init__(self) -> None:
            super().__init__()
            self.image_norm, self.text_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.image_qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
            self.image_out, self.text_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.image_norm2, self.text_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.image_ffn, self.text_ffn = FeedForward(), FeedForward()

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            one, other = self.image_qkv(self.image_norm(image)), self.text_qkv(self.text_norm(text))
            q, k, v = torch.cat([other, one], 1).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            image = image + self.image_out(y[:, text.shape[1] :])
            text = text + self.text_out(y[:, : text.shape[1]])
            return image + self.image_ffn(self.image_norm2(image)), text + self.text_ffn(
                self.text_norm2(text)
            )

    class Single(nn.Module):
        """Attention and feed-forward side by side, one projection in and one out."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH + 48), nn.Linear(WIDTH + 48, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            qkv, h = self.inward(self.norm(x)).split([3 * WIDTH, 48], -1)
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            return x + self.outward(torch.cat([y, F.gelu(h)], -1))

    def __init__(self) -> None:
        super().__init__()
        self.image_in, self.text_in = nn.Linear(16, WIDTH), nn.Linear(24, WIDTH)
        self.pairs = nn.ModuleList(Flux.Double() for _ in range(2))
        self.singles = nn.ModuleList(Flux.Single() for _ in range(2))
        self.last = nn.Linear(WIDTH, 16)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        one, other = self.image_in(image), self.text_in(text)
        length = other.shape[1]
        for block in self.pairs:
            one, other = block(one, other)
        x = torch.cat([other, one], 1)
        for single in self.singles:
            x = single(x)
        return self.last(x[:, length:])


class Hierarchical(nn.Module):
    """Two modules of transformer blocks that take turns, each fed with the other's state (HRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)
        self.low = nn.ModuleList(TransformerBlock() for _ in range(2))
        self.high = nn.ModuleList(TransformerBlock() for _ in range(2))
        self.low_start, self.high_start = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.last = nn.Linear(WIDTH, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        low, high = self.low_start.expand_as(x), self.high_start.expand_as(x)
        for _ in range(2):
            for _ in range(2):
                low = low + high + x
                for block in self.low:
                    low = block(low)
            high = high + low
            for block in self.high:
                high = block(high)
        return self.last(high)


class HyperConnections(nn.Module):
    """Several copies of the stream, mixed by small matrices before and after each block."""

    def __init__(self, copies: int = 2, layers: int = 2):
        super().__init__()
        self.copies, self.embedding = copies, nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(
            m for _ in range(layers) for m in (nn.Sequential(nn.LayerNorm(WIDTH), Attention(causal=True)),
                                               nn.Sequential(nn.LayerNorm(WIDTH), FeedForward()))
        )  # fmt: skip
        self.reads = nn.ParameterList(torch.rand(copies) for _ in self.blocks)
        self.writes = nn.ParameterList(torch.rand(copies) for _ in self.blocks)
        self.mixes = nn.ParameterList(
            torch.eye(copies) + 0.1 * torch.rand(copies, copies) for _ in self.blocks
        )
        self.last = nn.Linear(WIDTH, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)[:, :, None].expand(-1, -1, self.copies, -1)
        for block, read, write, mix in zip(self.blocks, self.reads, self.writes, self.mixes, strict=True):
            y = block(torch.einsum("bsnd,n->bsd", x, read))
            x = torch.einsum("bsnd,nm->bsmd", x, mix) + y[:, :, None] * write[:, None]
        return self.last(x.sum(2))


class Laurel(nn.Module):
    """Attention and a low-rank residual block on its input in one sum, as in Gemma 3n."""

    class Block(nn.Module):
        """Attention beside x + f(x), averaged, then a feed-forward."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(WIDTH) for _ in range(3))
            self.left, self.right = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)
            self.attention, self.ffn = Attention(causal=True), FeedForward()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed = self.norm1(x)
            laurel = normed + self.norm3(self.right(self.left(normed)))
            x = (x + self.attention(normed) + laurel) / 2**0.5
            return x + self.ffn(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 64)
        self.blocks = nn.ModuleList(Laurel.Block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class LayerEmbeddings(nn.Module):
    """Layers that read an embedding of the token of their own, between two projections of the stream (Gemma 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 64)
        self.of_layers, self.depth = nn.Embedding(64, 3 * 8), 3
        self.blocks = nn.ModuleList(TransformerBlock(causal=True) for _ in range(self.depth))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(self.depth))
        self.projections = nn.ModuleList(nn.Linear(8, WIDTH) for _ in range(self.depth))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        tokens = self.of_layers(input_ids).unflatten(-1, (self.depth, 8))
        for index, block in enumerate(self.blocks):
            x = block(x)
            gate = nn.functional.gelu(self.gates[index](x))
            x = x + self.projections[index](gate * tokens[:, :, index])
        return self.last(x)


class AlternatingUpdates(nn.Module):
    """Copies of the stream that are predicted from one another, one computed, and all corrected (AltUp)."""

    class Block(nn.Module):
        """Predict, compute the first copy, correct."""

        def __init__(self, copies: int) -> None:
            super().__init__()
            self.copies, self.inner = copies, TransformerBlock(causal=True)
            self.predict, self.correct = nn.Linear(WIDTH, copies * copies), nn.Linear(WIDTH, copies)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mix = torch.tanh(self.predict(x[0])).unflatten(-1, (self.copies, self.copies))
            x = x + torch.matmul(x.permute(1, 2, 3, 0), mix).permute(3, 0, 1, 2)
            y = self.inner(x[0])
            return x + (y - x[0])[None] * self.correct(y).permute(2, 0, 1)[..., None]

    def __init__(self, copies: int = 2) -> None:
        super().__init__()
        self.copies, self.embedding, self.last = copies, nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 64)
        self.blocks = nn.ModuleList(AlternatingUpdates.Block(copies) for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.stack([self.embedding(input_ids) * (i + 1) for i in range(self.copies)])
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(0))


class ShortConvolutions(nn.Module):
    """Attention whose queries and keys pass a short convolution with a residual of its own."""

    class Block(nn.Module):
        """Attention over x + conv(x), and a feed-forward."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.attention, self.ffn = Attention(causal=True), FeedForward()
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm1(x)
            h = h + self.conv(F.pad(h.transpose(1, 2), (2, 0))).transpose(1, 2)
            x = x + self.attention(h)
            return x + self.ffn(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 64)
        self.blocks = nn.ModuleList(ShortConvolutions.Block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Stages(nn.Module):
    """A residual block around whole transformer blocks that read its input without a projection."""

    class Stage(nn.Module):
        """x + blocks(x)."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TransformerBlock() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for block in self.blocks:
                y = block(y)
            return x + y

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.stages = nn.ModuleList(Stages.Stage() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return self.last(x)


class CrossStage(nn.Module):
    """Two convolutions of one value, a chain of residual convolutions on one, and their sum (RT-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.one, self.other = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.chain = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(WIDTH, 8, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.first(pixels))
        y = F.silu(self.one(x))
        for conv in self.chain:
            y = y + F.silu(conv(y))
        return self.last(y + F.silu(self.other(x)))


class Crossing(nn.Module):
    """Skips from inside one residual block to beyond its end, so that blocks cannot be nested."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.layers
        inner = torch.tanh(a(x))
        first = x + torch.tanh(b(inner))
        return d(inner + torch.tanh(c(first)))


class Recommender(nn.Module):
    """Tables of categories and a network of numbers, all pairs multiplied (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 16) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16))
        self.top = nn.Sequential(nn.Linear(16 + 16, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        return torch.sigmoid(self.top(torch.cat([x, (rows @ rows.transpose(1, 2)).flatten(1)], -1)))


class GraphConvolutions(nn.Module):
    """Features of neighbours gathered along edges and summed, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.first = nn.Linear(8, WIDTH)

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        x = self.first(features)
        for layer in self.layers:
            gathered = torch.zeros_like(x).index_add(0, edges[1], layer(x)[edges[0]])
            x = x + torch.relu(gathered)
        return x


class Recurrent(nn.Module):
    """An LSTM or GRU over a sequence, and a linear."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn, self.last = kind(8, WIDTH, batch_first=True), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.rnn(x)[0])


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(*shape: int, rows: int = 64) -> torch.Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(0))


def _unet(additive: bool) -> tuple[nn.Module, Any]:
    return UNet(additive), (_drawn(3, 4, 8, 8), _drawn(3, WIDTH), _drawn(3, 5, WIDTH))


def _transformer() -> tuple[nn.Module, Any]:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 48, batch_first=True, norm_first=True)
    return model, (_drawn(3, 7, WIDTH), _drawn(3, 5, WIDTH))


def _transformer_encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (_drawn(3, 7, WIDTH),)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "unet": lambda: _unet(False),
    "unet_additive": lambda: _unet(True),
    "dit": lambda: (DiT(), (_drawn(3, 4, 8, 8), _drawn(3, WIDTH))),
    "flux": lambda: (Flux(), (_drawn(3, 9, 16), _drawn(3, 5, 24))),
    "hierarchical": lambda: (Hierarchical(), (_ids(3, 7),)),
    "hyper_connections": lambda: (HyperConnections(), (_ids(3, 7),)),
    "laurel": lambda: (Laurel(), (_ids(3, 7),)),
    "layer_embeddings": lambda: (LayerEmbeddings(), (_ids(3, 7),)),
    "alternating_updates": lambda: (AlternatingUpdates(), (_ids(3, 7),)),
    "short_convolutions": lambda: (ShortConvolutions(), (_ids(3, 7),)),
    "stages": lambda: (Stages(), (_drawn(3, 7, 16),)),
    "cross_stage": lambda: (CrossStage(), (_drawn(3, 3, 8, 8),)),
    "crossing": lambda: (Crossing(), (_drawn(3, 7, WIDTH),)),
    "recommender": lambda: (Recommender(), (_drawn(3, 6), _ids(3, 3, rows=20))),
    "graph_convolutions": lambda: (GraphConvolutions(), (_drawn(10, 8), _ids(2, 30, rows=10))),
    "lstm": lambda: (Recurrent(nn.LSTM), (_drawn(3, 7, 8),)),
    "gru": lambda: (Recurrent(nn.GRU), (_drawn(3, 7, 8),)),
    "transformer": _transformer,
    "transformer_encoder": _transformer_encoder,
    "attention": lambda: (Attention(), (_drawn(3, 7, WIDTH),)),
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (_drawn(3, 8),)),
    "autoencoder": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)),
        (_drawn(3, 3, 8, 8),),
    ),
}


def network(name: str) -> tuple[nn.Module, Any]:
    """Return a network and its example inputs, with weights drawn from a fixed seed."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    return model.eval(), inputs


@functools.cache
def captured(name: str) -> graphopt.Program:
    """Return the program of a network, captured once a process; it is only read."""
    return graphopt.capture(*network(name), compare=False)
