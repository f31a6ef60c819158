"""window-attention: the module's own band, what an output depends on, pieces that give the whole, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import PassRefusedError, PipelineError
from graphopt.decoding.generation import with_cache
from graphopt.ir.checking.streaming import initial_state, stream
from graphopt.ir.export_blockers import export_blockers
from graphopt.ir.program import Program

D = torch.float64
FEATURES, WIDTH, HEADS, KEYS, LAYERS = 6, 16, 4, 2, 3
Bounds = list[tuple[int | None, int | None]]


class Frames(nn.Module):
    """An encoder of frames (batch, frames, 6): a causal convolution for positions, then layers of attention.

    Args:
        seed: of the weights.
        bounds: how many earlier and later frames each attention sees, written out as a band; None for all.
        padding: it takes which frames there are.
    """

    def __init__(self, seed: int, bounds: Bounds | None = None, padding: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.bounds, self.padding = bounds or [(None, None)] * LAYERS, padding
        self.first = nn.Conv1d(FEATURES, WIDTH, 3)
        kv = 2 * WIDTH * KEYS // HEADS
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.q, self.kv, self.o = (
            nn.ModuleList(nn.Linear(WIDTH, n) for _ in range(LAYERS)) for n in (WIDTH, kv, WIDTH)
        )
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.first(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        batch, frames, _ = y.shape
        index = torch.arange(frames)
        ahead = index[None, :] - index[:, None]
        for layer, (past, future) in enumerate(self.bounds):
            h = self.norm[layer](y)
            q = self.q[layer](h).view(batch, frames, HEADS, -1).transpose(1, 2)
            k, v = self.kv[layer](h).view(batch, frames, 2, KEYS, -1).permute(2, 0, 3, 1, 4)
            k, v = (t.repeat_interleave(HEADS // KEYS, 1) for t in (k, v))
            seen = torch.ones(frames, frames, dtype=torch.bool)
            if past is not None:
                seen = seen & (ahead >= -past)
            if future is not None:
                seen = seen & (ahead <= future)
            seen = seen[None, None] if mask is None else seen[None, None] & (mask[:, None, None, :] != 0)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            y = y + self.o[layer](mixed.transpose(1, 2).flatten(2))
        return self.last(torch.tanh(y))


def drawn(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, frames, FEATURES, dtype=D, generator=torch.Generator().manual_seed(seed)) * 2


def captured(seed: int, bounds: Bounds | None = None) -> Program:
    return graphopt.capture(Frames(seed, bounds).double().eval(), drawn(9))


def windowed(
    program: Program, past: int | None, future: int | None, layers: list[int] | None = None
) -> Program:
    given_ = {"past": past, "future": future}
    text = " ".join(f"{name}={value}" for name, value in given_.items() if value is not None)
    if layers is not None:
        text += f" layers=[{' '.join(map(str, layers))}]"
    return graphopt.optimize(program, f"window-attention{{{text}}}", inputs=drawn(9))


BOUND = st.one_of(st.none(), st.integers(0, 5))


@settings(max_examples=examples(12))
@given(
    seed=st.integers(0, 99), past=BOUND, future=BOUND, frames=st.integers(1, 24),
    layers=st.one_of(st.none(), st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted)),
)  # fmt: skip
def test_it_is_the_module_with_that_band(
    seed: int, past: int | None, future: int | None, frames: int, layers: list[int] | None
) -> None:
    """Wrong if a window were off by one, on the wrong side or in another layer."""
    if past is None and future is None:
        return
    chosen = range(LAYERS) if layers is None else layers
    bounds: Bounds = [(past, future) if n in chosen else (None, None) for n in range(LAYERS)]
    found = windowed(captured(seed), past, future, layers)(drawn(frames, seed))
    expected = Frames(seed, bounds).double()(drawn(frames, seed))
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@settings(max_examples=examples(8))
@given(past=st.integers(0, 3), future=st.integers(0, 2), frame=st.integers(0, 39))
def test_outputs_depend_on_nothing_beyond_all_windows(past: int, future: int, frame: int) -> None:
    """Bounds add up over layers; the convolution before reads two frames back."""
    program = windowed(captured(3), past, future)
    x = drawn(40)
    other = x.clone()
    first, last = frame - LAYERS * past - 2, frame + LAYERS * future
    for outside in (range(max(first, 0)), range(last + 1, 40)):
        other[:, list(outside)] += 3.0
    assert torch.equal(program(x)[:, frame], program(other)[:, frame])
    for edge in {max(first, 0), min(last, 39)}:
        changed = x.clone()
        changed[:, edge] += 3.0
        assert not torch.equal(program(x)[:, frame], program(changed)[:, frame]), (
            "a window is narrower than asked"
        )


def test_windows_as_wide_as_the_text_change_nothing() -> None:
    program, x = captured(1), drawn(20)
    assert torch.allclose(windowed(program, 19, 19)(x), program(x), atol=1e-13)


def test_windows_only_narrow() -> None:
    narrow = windowed(captured(2), 3, 1)
    with pytest.raises(PassRefusedError, match="what it sees follows"):
        windowed(narrow, 2, 0)
    causal = windowed(captured(2), 3, 0)
    with pytest.raises(PassRefusedError, match="matched nothing"):
        windowed(causal, 5, 2)
    x = drawn(20)
    assert torch.equal(windowed(causal, 1, None)(x), windowed(captured(2), 1, 0)(x))


@settings(max_examples=examples(10))
@given(
    seed=st.integers(0, 99), past=st.integers(0, 9),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=8), narrower=st.booleans(),
)  # fmt: skip
def test_any_pieces_give_the_whole(seed: int, past: int, pieces: list[int], narrower: bool) -> None:
    """States have one size, whatever the length of the stream."""
    program = windowed(captured(seed), past, 0)
    if narrower and past:
        program = windowed(program, past - 1, None, [1])
    streaming = graphopt.optimize(program, "stream-convolutions")
    x = drawn(sum(pieces), seed)
    found = torch.cat(list(stream(streaming, x.split(pieces, dim=1))), 1)
    assert torch.allclose(found, program(x), atol=1e-12)
    sizes = {name: state.shape for name, state in initial_state(streaming, 2).items()}
    assert all(shape[2] <= past for name, shape in sizes.items() if name.startswith("key_state"))
    assert sum(name.startswith("key_state") for name in sizes) == (
        LAYERS if past > 1 or not narrower else LAYERS - 1
    ) * (past > 0)


def test_frames_that_are_missing_stay_hidden() -> None:
    """A mask of frames goes along with their keys."""
    model, x = Frames(5, padding=True).double().eval(), drawn(30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, 4:9] = 0
    example = {"x": drawn(9), "mask": torch.ones(2, 9, dtype=torch.int64)}
    program = graphopt.optimize(
        graphopt.capture(model, example), "window-attention{past=6 future=0}", inputs=example
    )
    streaming = graphopt.optimize(program, "stream-convolutions")
    pieces = [{"x": x[:, a:b], "mask": mask[:, a:b]} for a, b in ((0, 5), (5, 6), (6, 17), (17, 30))]
    found = torch.cat(list(stream(streaming, pieces)), 1)
    assert torch.allclose(found, program(x, mask), atol=1e-12)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("stream-convolutions", "reads later frames"),
        ("window-attention{future=0}, stream-convolutions", "reads all earlier frames"),
        ("window-attention{past=3 future=1}, stream-convolutions", "reads later frames"),
        ("window-attention{past=3}, stream-convolutions", "reads later frames"),
    ],
)
def test_what_cannot_stream_says_why(pipeline: str, reason: str) -> None:
    program = captured(0)
    before = program.text()
    with pytest.raises(PassRefusedError, match=reason):
        graphopt.optimize(program, pipeline, inputs=drawn(9))
    assert program.text() == before


def test_positions_that_begin_anew_in_every_piece_are_refused(captured: Callable[[str], Program]) -> None:
    """Rotary angles count from the first token of a piece, which is no longer the first of the text."""
    program = graphopt.optimize(captured("llama"), "window-attention{past=4}")
    with pytest.raises(PassRefusedError, match="depend on frames outside the piece"):
        graphopt.optimize(program, "stream-convolutions")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "say what is bounded"),
        ("{past=-1}", "past"),
        ("{past=2 layers=[]}", "empty or lists"),
        ("{past=2 layers=[1 1]}", "empty or lists"),
        ("{past=2 layers=[7]}", "no attention 7"),
    ],
)
def test_wrong_options(options: str, reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        graphopt.optimize(captured(0), f"window-attention{options}", inputs=drawn(9))


def test_a_decoder_writes_the_same_with_its_caches(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """The window is that of the cached program too, saved and loaded, and a folder says why it cannot hold it."""
    program = graphopt.optimize(captured("llama"), "window-attention{past=5}")
    cached = with_cache(program)
    rows = [[5, 9, 33, 7, 8, 21, 40, 11, 2, 6], [4, 17]]
    written = graphopt.generate(cached, rows, max_new_tokens=10, eos_token_id=None)
    for row, found in zip(rows, written[:, -10:].tolist(), strict=True):
        text = list(row)
        for _ in range(10):
            text.append(int(program(torch.tensor([text]))["logits"][0, -1].argmax()))
        assert found == text[len(row) :]
    program.save(tmp_path / "program")
    again = graphopt.load(tmp_path / "program")
    ids = torch.tensor([rows[0]])
    assert torch.equal(again(ids)["logits"], program(ids)["logits"])
    assert export_blockers(program)["window-attention"]
