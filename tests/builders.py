"""Small transformers and convolutional networks written by hand, in the spellings that models use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

D = torch.float64


@dataclass(frozen=True)
class Shape:
    """A transformer in float64: sizes, where norms are, how projections are stored and spelled."""

    layers: int = 2
    size: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 4
    width: int = 10
    gated: bool = True
    bias: bool = False
    norm: str = "rms"  # rms, layer, written_rms, written_layer
    placement: str = "pre"  # pre, post, sandwich, parallel
    qkv: str = "separate"  # separate, plain, grouped, interleaved
    gate_up: str = "separate"  # separate, plain, interleaved
    spelling: str = "linear"  # linear, conv1d, transposed
    tied: bool = False
    rotary: bool = True
    causal: bool = True
    vocab: int = 17


class Projection(nn.Module):
    """A linear: ``F.linear``, GPT-2's ``addmm`` on flattened rows, or ``x @ w.T + b``."""

    def __init__(self, rows: int, columns: int, bias: bool, spelling: str, generator: torch.Generator):
        super().__init__()
        shape = (columns, rows) if spelling == "conv1d" else (rows, columns)
        scale = columns**-0.5
        self.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=D) * scale)
        self.bias = nn.Parameter(torch.randn(rows, generator=generator, dtype=D)) if bias else None
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.spelling == "transposed":
            product = x @ self.weight.T
            return product if self.bias is None else product + self.bias
        if self.bias is None:
            return x @ self.weight
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class Norm(nn.Module):
    """RMSNorm or LayerNorm, called or written out, with weights that are far from one and zero."""

    def __init__(self, size: int, kind: str, generator: torch.Generator):
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(1 + 0.5 * torch.randn(size, generator=generator, dtype=D))
        if "layer" in kind:
            self.offset = nn.Parameter(torch.randn(size, generator=generator, dtype=D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, (x.shape[-1],), self.scale, 1e-5)
        if self.kind == "layer":
            return F.layer_norm(x, (x.shape[-1],), self.scale, self.offset, 1e-5)
        if self.kind == "written_rms":
            return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        return centred / spread * self.scale + self.offset


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in halves, written out."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2], dtype=D)[:, None] / 100.0 ** (torch.arange(0, size, 2, dtype=D) / size)
    table = torch.cat((angles, angles), -1)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return x * table.cos() + torch.cat((-second, first), -1) * table.sin()


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are stored apart, joined, grouped or interleaved."""

    def __init__(self, shape: Shape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        s, rows = shape, (shape.heads + 2 * shape.kv_heads) * shape.head_size

        def make(rows: int, columns: int) -> Projection:
            return Projection(rows, columns, s.bias, s.spelling, generator)

        if s.qkv == "separate":
            self.query = make(s.heads * s.head_size, s.size)
            self.key = make(s.kv_heads * s.head_size, s.size)
            self.value = make(s.kv_heads * s.head_size, s.size)
        else:
            self.joined = make(rows, s.size)
        self.out = make(s.size, s.heads * s.head_size)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, (b, n, _) = self.shape, x.shape
        if s.qkv == "separate":
            q, k, v = self.query(x), self.key(x), self.value(x)
        elif s.qkv == "plain":
            kv = s.kv_heads * s.head_size
            q, k, v = self.joined(x).split([s.heads * s.head_size, kv, kv], dim=-1)
        elif s.qkv == "grouped":
            grouped = self.joined(x).view(b, n, s.kv_heads, s.heads // s.kv_heads + 2, s.head_size)
            q, k, v = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
        else:
            q, k, v = self.joined(x).view(b, n, s.heads, 3 * s.head_size).chunk(3, dim=-1)
        sizes = (s.heads, s.kv_heads, s.kv_heads)
        q, k, v = (
            part.reshape(b, n, count, s.head_size).transpose(1, 2)
            for part, count in zip((q, k, v), sizes, strict=True)
        )
        return q, k, v

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        s, (b, n, _) = self.shape, x.shape
        q, k, v = self.parts(x)
        if s.rotary:
            q, k = rotate(q), rotate(k)
        repeats = s.heads // s.kv_heads
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(s.head_size)
        position = torch.arange(n)
        if s.causal:
            scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e30)
        out = torch.softmax(scores, -1) @ v
        return self.out(out.transpose(1, 2).reshape(b, n, -1))


class FeedForward(nn.Module):
    """A feed-forward, gated or not, gate and up stored apart, joined or interleaved."""

    def __init__(self, shape: Shape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        s = shape
        joined = s.gated and s.gate_up != "separate"
        self.rise = Projection(s.width * (2 if joined else 1), s.size, s.bias, s.spelling, generator)
        if s.gated and not joined:
            self.door = Projection(s.width, s.size, s.bias, s.spelling, generator)
        self.fall = Projection(s.size, s.width, s.bias, s.spelling, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.shape
        if not s.gated:
            return self.fall(F.gelu(self.rise(x)))
        if s.gate_up == "separate":
            gate, up = self.door(x), self.rise(x)
        elif s.gate_up == "plain":
            gate, up = self.rise(x).chunk(2, dim=-1)
        else:
            both = self.rise(x)
            gate, up = both[..., ::2], both[..., 1::2]
        return self.fall(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward on the stream, with norms where the shape says."""

    def __init__(self, shape: Shape, generator: torch.Generator):
        super().__init__()
        self.placement = shape.placement
        self.mix, self.think = Attention(shape, generator), FeedForward(shape, generator)
        count = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[shape.placement]
        self.norms = nn.ModuleList(Norm(shape.size, shape.norm, generator) for _ in range(count))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        norms = self.norms
        if self.placement == "parallel":
            h = norms[0](x)
            return x + self.mix(h, mask) + self.think(h)
        if self.placement == "post":
            x = norms[0](x + self.mix(x, mask))
            return norms[1](x + self.think(x))
        if self.placement == "sandwich":
            x = x + norms[1](self.mix(norms[0](x), mask))
            return x + norms[3](self.think(norms[2](x)))
        x = x + self.mix(norms[0](x), mask)
        return x + self.think(norms[1](x))


class Transformer(nn.Module):
    """Token numbers and a padding mask in, logits out."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(shape.vocab, shape.size, generator=generator, dtype=D))
        self.blocks = nn.ModuleList(Layer(shape, generator) for _ in range(shape.layers))
        self.last = Norm(shape.size, shape.norm, generator)
        self.head = self.table
        if not shape.tied:
            self.head = nn.Parameter(torch.randn(shape.vocab, shape.size, generator=generator, dtype=D))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        x = F.embedding(input_ids, self.table)
        for block in self.blocks:
            x = block(x, attention_mask)
        return {"logits": F.linear(self.last(x), self.head)}


def tokens(batch: int, length: int, *, seed: int = 0, vocab: int = 17, padded: bool = True) -> dict[str, Any]:
    """Return token numbers and a mask that hides the end of the first row and the start of the second."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_llama_folder(folder: Path, texts: list[str]) -> Path:
    """Write a small Llama with random weights and a byte-pair tokenizer fitted to texts; made for 64 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
