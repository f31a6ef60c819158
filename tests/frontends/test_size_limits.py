"""What an export decides about sizes stays with the program: tried against the model, enforced, saved, printed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

import graphopt
from graphopt.frontends.size_limits import settle_by_guards
from graphopt.ir.constraints import parse_relation
from graphopt.ir.errors import CheckpointError
from graphopt.ir.signature import Signature, SizeRange

D = torch.float64


def module(forward: Callable[..., Any], *layers: nn.Module) -> nn.Module:
    made: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    made.layers = nn.ModuleList(layers)
    return made.double().eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


def chunks(self: Any, x: torch.Tensor) -> torch.Tensor:
    """One mean for each 16 tokens: the loop is unrolled for the number of chunks that the example has."""
    return torch.cat([c - c.mean(1, keepdim=True) for c in x.split(16, 1)], 1)


def padded(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Chunks of 8 after padding to whole ones, as linear attention does, one after the other."""
    length = x.shape[1]
    blocks = F.pad(x, (0, 0, 0, (8 - length % 8) % 8)).reshape(x.shape[0], -1, 8, x.shape[2])
    state = torch.zeros_like(blocks[:, 0])
    outputs = []
    for index in range(blocks.shape[1]):
        state = state * 0.5 + blocks[:, index]
        outputs.append(state)
    return torch.stack(outputs, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length]


def longer(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (2.0 if x.shape[1] > 20 else 1.0)


def agree(
    program: graphopt.Program, model: nn.Module, make: Callable[[int], Any], lengths: range
) -> list[int]:
    """Compare at each length; returns those the program refuses."""
    refused = []
    for length in lengths:
        x = make(length)
        try:
            found = program(x)
        except graphopt.UsageError as error:
            assert "the program takes" in str(error)
            refused.append(length)
            continue
        torch.testing.assert_close(found, model(x))
    return refused


@pytest.mark.parametrize(
    ("forward", "example", "low", "high"),
    [
        (chunks, 13, 1, 16),
        (chunks, 16, 1, 16),
        (chunks, 40, 33, 48),
        (padded, 5, 1, 8),
        (padded, 19, 17, 24),
        (longer, 5, 1, 20),
        (longer, 30, 21, None),
    ],
)
def test_a_size_that_unrolls_or_branches_is_limited(
    forward: Callable[..., Any], example: int, low: int, high: int | None
) -> None:
    """Wrong if a program were run at sizes for which its model does something else than it was captured doing."""
    model = module(forward)
    program = graphopt.capture(model, draw(2, example, 4))
    limits = program.signature.sizes["sequence"]
    assert (limits.low, limits.high) == (low, high)
    allowed = range(low, (high or 70) + 1)
    assert agree(program, model, lambda n: draw(1, n, 4), range(1, 70)) == [
        n for n in range(1, 70) if n not in allowed
    ]


class UNet(nn.Module):
    """Halves its images three times, and joins what it kept of each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4 if i else 3, 4, 3, padding=1) for i in range(depth))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for i in range(depth - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for layer in self.down:
            x = layer(x).relu()
            if len(kept) < len(self.up):
                kept.append(x)
                x = F.max_pool2d(x, 2)
        for layer, skip in zip(self.up, reversed(kept), strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skip], 1)).relu()
        return x


@pytest.mark.parametrize("size", [8, 16])
def test_an_example_at_the_smallest_size_does_not_fix_it(size: int) -> None:
    """Wrong if images of other sizes were refused that the network takes, or taken that it refuses."""
    model = UNet(4).double().eval()
    program = graphopt.capture(model, draw(1, 3, size, size))
    for height, width in ((8, 8), (8, 16), (16, 16), (32, 16), (40, 64)):
        x = draw(2, 3, height, width)
        torch.testing.assert_close(program(x), model(x))
    assert all(limits.high is None for limits in program.signature.sizes.values())
    with pytest.raises(graphopt.UsageError, match=r"size is 12: the program takes sizes with size % 8 == 0"):
        program(draw(1, 3, 12, 16))


def test_a_size_that_is_too_small_to_vary_is_captured_from_a_larger_example() -> None:
    """Wrong if the last piece of the example, one entry long, fixed the length that the model lets vary."""
    model = module(lambda self, x: torch.cat([x[:, :4] * 2, self.layers[0](x[:, 4:])], 1), nn.Linear(3, 3))
    program = graphopt.capture(model, draw(2, 5, 3))
    assert agree(program, model, lambda n: draw(2, n, 3), range(5, 15)) == []


def test_limits_are_saved_loaded_and_enforced(tmp_path: Path) -> None:
    model = UNet(3).double().eval()
    program = graphopt.capture(model, draw(1, 3, 8, 8))
    assert program.signature.constraints == ("size % 4 == 0", "size_2 % 4 == 0")
    program.save(tmp_path / "p")
    loaded = graphopt.load(tmp_path / "p")
    assert loaded.signature.constraints == program.signature.constraints
    torch.testing.assert_close(loaded(draw(1, 3, 12, 20)), model(draw(1, 3, 12, 20)))
    for held in (loaded, program.copy(), program.module()):
        with pytest.raises(graphopt.UsageError, match="size % 4 == 0"):
            held(draw(1, 3, 10, 8))


def test_limits_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.cli.running import run

    graphopt.capture(UNet(3).double().eval(), draw(1, 3, 8, 8)).save(tmp_path / "p")
    asked = ["inspect", str(tmp_path / "p"), "--batch", "2", "--sequence", "16"]
    assert run(asked) == 0
    assert "size % 4 == 0" in capsys.readouterr().out
    assert run([*asked, "--json"]) == 0
    assert '"size % 4 == 0"' in capsys.readouterr().out


def test_passes_and_exports_keep_to_sizes_that_the_program_takes(tmp_path: Path) -> None:
    """Wrong if a check ran a program at sizes it refuses, or a file were written for one of these."""
    program = graphopt.capture(UNet(3).double().eval(), draw(1, 3, 8, 8))
    folded = graphopt.optimize(program, "fuse-branches{allow_no_match=true}")
    assert folded.signature.constraints == program.signature.constraints
    with pytest.raises(graphopt.LoweringError, match="size % 4 == 0"):
        program.lower("onnx", tmp_path / "m.onnx", sizes={"batch": 1, "size": 6, "size_2": 8})


# -- sizes that inputs share ------------------------------------------------------------------------


def test_sizes_that_a_model_wants_equal_are_one() -> None:
    """Wrong if one of two sizes were fixed because it was varied without the other."""
    model = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    program = graphopt.capture(model, (draw(2, 5, 4), draw(2, 7, 4), draw(2, 7, 4)))
    assert {n: s.shape[0] for n, s in program.signature.inputs.items()} == dict.fromkeys(
        ("query", "key", "value"), "batch"
    )
    for batch in (1, 3, 6):
        inputs = draw(batch, 3, 4), draw(batch, 9, 4), draw(batch, 9, 4)
        torch.testing.assert_close(program(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_index_with_fewer_rows_is_taken_as_the_model_takes_it(rows: int) -> None:
    model = module(lambda self, x, index: x.gather(1, index))
    index = torch.zeros(rows, 3, dtype=torch.long)
    program = graphopt.capture(model, (draw(rows, 6), index))
    for x, i in (
        (draw(4, 6), torch.ones(4, 3)),
        (draw(4, 9), torch.ones(2, 3)),
        (draw(1, 2), torch.ones(1, 5)),
    ):
        torch.testing.assert_close(program(x, i.long()), model(x, i.long()))
    with pytest.raises(graphopt.UsageError, match="batch_2 <= batch"):
        program(draw(1, 6), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_size_that_the_model_refuses_is_no_ground_against_the_capture(rows: int) -> None:
    """Wrong if comparing at sizes of the tool's own choosing failed a capture that is right."""
    model = module(lambda self, x: x.reshape(-1, 3, 2))
    program = graphopt.capture(model, draw(rows, 6))
    for shape in ((1, 6), (3, 6), (2, 12)):
        torch.testing.assert_close(program(draw(*shape)), model(draw(*shape)))


# -- from an export, without its model --------------------------------------------------------------


def exported(forward: Callable[..., Any], *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    named = dict(zip("xy", inputs, strict=False))
    shapes = {n: dict.fromkeys(range(v.dim()), Dim.AUTO) for n, v in named.items()}
    return torch.export.export(module(forward), (), named, dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize(("example", "low", "high"), [(13, 1, 16), (40, 34, 48)])
def test_guards_of_an_export_are_kept(
    example: int, low: int, high: int, through_file: bool, tmp_path: Path
) -> None:
    """Wrong if a program made of an export, or of its file, took sizes that torch's own module refuses."""
    found = exported(chunks, draw(3, example, 4))
    if through_file:
        buffer = io.BytesIO()
        torch.export.save(found, buffer)
        (tmp_path / "m.pt2").write_bytes(buffer.getvalue())
        program = graphopt.capture(tmp_path / "m.pt2", trust=True)
    else:
        program = graphopt.capture(found)
    model = module(chunks)
    refused = agree(program, model, lambda n: draw(3, n, 4), range(1, 70))
    assert refused == [n for n in range(1, 70) if not low <= n <= high]


# -- relations as text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "limits", "left"),
    [
        (["batch <= 40", "batch != 1"], (2, 40), ()),
        (["(batch // 16) == 1", "batch == (8 * (batch // 8))"], (16, 31), ("batch % 8 == 0",)),
        (["(batch % 4) == 0", "(batch % 6) == 0"], (1, None), ("batch % 12 == 0",)),
        (["batch != 30"], (1, None), ("batch != 30",)),
        (["batch <= 5000"], (1, 5000), ()),
        (["batch <= 30 or batch == 37"], (1, None), ("batch <= 30 or batch == 37",)),
    ],
)
def test_constraints_of_one_size_become_ranges_and_remainders(
    texts: list[str], limits: tuple[int, int | None], left: tuple[str, ...]
) -> None:
    from graphopt.frontends.size_limits import simplify

    signature = Signature({}, {}, {"constant": None}, {"batch": SizeRange(1, None, 24)}, tuple(texts))
    simplify(signature)
    found = signature.sizes["batch"]
    assert ((found.low, found.high), signature.constraints) == (limits, left)


@given(
    low=st.integers(1, 30), span=st.integers(0, 40), step=st.integers(1, 9), other=st.integers(1, 9),
    wanted=st.integers(1, 200),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_nearest_sizes_are_taken(low: int, span: int, step: int, other: int, wanted: int) -> None:
    """Wrong if a check chose sizes that the program refuses, or changed what it takes."""
    high = low + span + step * other
    texts = (f"batch % {step} == 0", f"sequence == {other}*batch")
    hint = step * -(-low // step)
    sizes = {"batch": SizeRange(low, high, hint), "sequence": SizeRange(1, None, other * hint)}
    signature = Signature({}, {}, {"constant": None}, sizes, texts)
    assert signature.takes({"batch": hint, "sequence": other * hint})
    found = signature.nearest({"batch": wanted})
    assert signature.takes(found)
    assert signature.nearest(found) == found


@pytest.mark.parametrize(
    "text", ["", "batch", "batch = 3", "x < 3", "batch < __import__('os')", "batch == 1 or"]
)
def test_what_is_no_relation_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        parse_relation(text, frozenset({"batch"}))


def test_settling_without_a_model_says_equal_sizes_once() -> None:
    found = graphopt.capture(exported(lambda self, x, y: torch.bmm(x, y), draw(3, 4, 5), draw(3, 5, 6)))
    settle_by_guards(found)
    assert found.signature.constraints == ()
    assert [spec.shape for spec in found.signature.inputs.values()] == [
        ("batch", "sequence", "size"),
        ("batch", "size", "size_2"),
    ]


# -- windows that the example does not reach ---------------------------------------------------------


class Local(nn.Module):
    """Attention whose mask is cut from a table: causal, or with a window too."""

    def __init__(self, window: int, positions: int) -> None:
        super().__init__()
        seen = torch.ones(positions, positions, dtype=torch.bool).tril()
        self.register_buffer("seen", seen ^ seen.tril(-window) if window else seen)
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).reshape(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        scores = q @ k.mT
        seen = self.seen[: x.shape[1], : x.shape[1]]
        return torch.softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), -1) @ v


@pytest.mark.parametrize(("window", "positions"), [(14, 64), (40, 300), (0, 64), (14, 14)])
def test_a_window_in_a_table_is_found_beyond_the_example(window: int, positions: int) -> None:
    """Wrong if a window were lost because no input that was tried is as long as it."""
    model = Local(window, positions).double().eval()
    program = graphopt.capture(model, draw(2, 9, 8))
    for length in {1, 13, 14, window, window + 1, positions} - {0}:
        if length <= positions:
            torch.testing.assert_close(program(draw(1, length, 8)), model(draw(1, length, 8)))
    (attention,) = (n for n in program.graph.nodes if "graphopt.attention" in str(n.target))
    assert attention.kwargs.get("window") == (window if 0 < window < positions else None)


def test_a_decoder_with_local_attention_sees_its_window() -> None:
    """Wrong beyond 14 tokens if only the example of 13 decided what its masks mean."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, vocab_size=64, window_size=14, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(config).eval()
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 64, (2, 8))})
    for length in (13, 14, 15, 46, 64):
        ids = torch.randint(3, 64, (2, length))
        torch.testing.assert_close(program(input_ids=ids)["logits"], model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(graphopt.UsageError, match="takes up to 64"):
        program(input_ids=torch.randint(3, 64, (1, 65)))


def test_a_decoder_in_blocks_takes_the_lengths_of_its_number_of_blocks() -> None:
    """Wrong if lengths that need another number of blocks were taken."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MiniMaxConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=2, block_size=8, layer_types=["linear_attention", "full_attention"],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(config).eval()
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 64, (2, 13))})
    limits = program.signature.sizes["sequence"]
    assert (limits.low, limits.high) == (9, 16)
    model.config.use_cache = False
    for length in (9, 11, 16):
        ids = torch.randint(3, 64, (1, length))
        torch.testing.assert_close(program(input_ids=ids)["logits"], model(ids).logits, rtol=1e-4, atol=1e-5)
    for length in (8, 17):
        with pytest.raises(graphopt.UsageError, match="sequence is"):
            program(input_ids=torch.randint(3, 64, (1, length)))
