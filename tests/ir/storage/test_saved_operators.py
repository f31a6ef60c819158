"""What capture takes, save takes: operators, values that are no tensors, and how they are spelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.cli.running import run
from graphopt.ir.errors import CheckpointError
from graphopt.ir.rewriting.respelling import SPELLINGS, respelled
from graphopt.ir.running.fold import fold
from graphopt.ir.storage.allowed import allowed, name_of, operator_of
from graphopt.ir.storage.aten import ATEN, REFUSED

D = torch.float64


def module(forward: Callable[..., Any]) -> nn.Module:
    made: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    return made.eval()


def again(program: graphopt.Program, folder: Path) -> graphopt.Program:
    """Return a program saved and loaded, which must read like itself."""
    program.save(folder / "p")
    loaded = graphopt.load(folder / "p")
    assert loaded.operators == fold(program, to_store=True).operators
    loaded.save(folder / "q")
    assert (folder / "p/program.json").read_bytes() == (folder / "q/program.json").read_bytes()
    return loaded


def overloads() -> list[Any]:
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if space == "aten" and hasattr(torch.ops.aten, base):
            operator = getattr(getattr(torch.ops.aten, base), overload or "default", None)
            if operator is not None:
                found.append(operator)
    return found


def test_every_core_operator_is_allowed_or_refused_for_a_reason() -> None:
    """Wrong if a core operator could be captured, and met a refusal only when the work is done."""
    core = [o for o in overloads() if torch.Tag.core in o.tags]
    assert len(core) > 150
    for operator in core:
        base = operator._schema.name.removeprefix("aten::")
        if operator._schema.is_mutable or base in REFUSED:
            with pytest.raises(CheckpointError):
                name_of(operator, "here")
        else:
            assert operator_of(name_of(operator, "here")) is operator
    assert not set(REFUSED) & ATEN


def test_nothing_that_reads_or_writes_files_is_allowed() -> None:
    forbidden = "save from_file _print set_ set set_data record_stream resize resize_ pin_memory _pin_memory to_mkldnn data_ptr"
    for name in forbidden.split():
        assert f"aten.{name}" not in allowed()
    for operator in overloads():
        kinds = {str(a.type) for a in operator._schema.arguments}
        if "Storage" in " ".join(kinds) or operator._schema.name == "aten::from_file":
            with pytest.raises(CheckpointError):
                name_of(operator, "here")


def test_another_name_of_an_operator_computes_the_same() -> None:
    for name, usual in SPELLINGS.items():
        packet = getattr(torch.ops.aten, name)
        known = [respelled(getattr(packet, o)) for o in packet.overloads()]
        assert any(f is not None and f._schema.name == f"aten::{usual}" for f in known), name
    x = torch.rand(3, 4, dtype=D) * 0.8 + 0.1
    for name, usual in SPELLINGS.items():
        overload = getattr(getattr(torch.ops.aten, name), "default", None)
        if overload is not None and [str(a.type) for a in overload._schema.arguments] == ["Tensor"]:
            found = getattr(torch.ops.aten, usual).default(x)
            torch.testing.assert_close(overload(x), found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x / x.shape[1] ** 0.5,
        lambda self, x: x * math.floor(x.shape[1] / 3),
        lambda self, x: x * math.ceil(x.shape[1] / 3),
        lambda self, x: x * round(x.shape[1] / 3),
        lambda self, x: x * math.trunc(x.shape[1] / 3),
        lambda self, x: x * x.shape[1] ** 2,
        lambda self, x: x * (1 / x.shape[1]),
        lambda self, x: nn.functional.interpolate(x[None], scale_factor=1.5),
    ],
    ids=["root", "floor", "ceil", "round", "trunc", "square", "inverse", "scale"],
)
def test_numbers_computed_from_sizes_come_back(forward: Callable[..., Any], tmp_path: Path) -> None:
    """Wrong if a number that a size gives could not be saved, or came back as that of the example."""
    program = graphopt.capture(module(forward), torch.randn(2, 6))
    loaded = again(program, tmp_path)
    for length in (6, 9, 11):
        x = torch.randn(3, length)
        torch.testing.assert_close(loaded(x), forward(None, x))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_vector_that_is_split_is_saved(parts: int, tmp_path: Path) -> None:
    model = module(lambda self, x: sum(p * x for p in self.b.chunk(parts)))
    model.b = nn.Parameter(torch.randn(4 * parts))
    program = graphopt.capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(program, tmp_path)(x), model(x))


def test_attention_over_another_sequence_is_saved(tmp_path: Path) -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    inputs = torch.randn(2, 5, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    program = graphopt.capture(model, inputs)
    torch.testing.assert_close(again(program, tmp_path)(*inputs)[0], model(*inputs)[0])


def test_bits_of_integers_are_saved_under_one_name(tmp_path: Path) -> None:
    model = module(lambda self, x, y: ((x & 3) | (y << 1)) ^ (x >> 1))
    inputs = torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3) * 5
    program = graphopt.capture(model, inputs)
    assert not [name for name in program.operators if "__" in name]
    assert torch.equal(again(program, tmp_path)(*inputs), model(*inputs))


POINTWISE: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.sinh, torch.arctan, torch.special.expit, torch.special.log1p, lambda x: torch.clip(x, -1, 1), torch.negative,
    lambda x: torch.multiply(x, 2), lambda x: torch.subtract(x, 1), lambda x: torch.divide(x, 3), torch.fix, torch.angle,
    lambda x: torch.float_power(x.abs() + 1, 0.5).to(x.dtype), torch.special.entr, torch.i0, lambda x: torch.hypot(x, x),
    lambda x: torch.ldexp(x, x.new_tensor(2)), lambda x: torch.where(torch.greater(x, 0), x, -x), torch.special.ndtr,
]  # fmt: skip
SHAPED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: torch.moveaxis(x, 0, 1), torch.fliplr, lambda x: torch.concat([x, x], 1), lambda x: torch.msort(x),
    lambda x: torch.row_stack([x, x]), lambda x: torch.diff(x, prepend=x[:, :1]), lambda x: torch.kthvalue(x, 2).values[:, None],
    lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:]), lambda x: torch.linalg.svdvals(x)[None],
    lambda x: torch.fft.fftshift(x), lambda x: torch.cdist(x, x), lambda x: torch.logcumsumexp(x, 0),
]  # fmt: skip


@given(
    first=st.sampled_from(POINTWISE), middle=st.sampled_from(SHAPED), last=st.sampled_from(POINTWISE),
    rows=st.integers(2, 4), columns=st.integers(2, 5),
)  # fmt: skip
@settings(
    max_examples=examples(36), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_was_captured_is_saved_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, first: Any, middle: Any, last: Any, rows: int, columns: int
) -> None:
    """Wrong if a program reads or computes otherwise after it was saved and loaded."""
    model = module(lambda self, x: last(middle(first(x))))
    x = torch.randn(rows, columns, dtype=D, generator=torch.Generator().manual_seed(rows * columns))
    assume(bool(torch.isfinite(first(x)).all()))  # LAPACK promises nothing about infinite matrices
    program = graphopt.capture(model, x, dynamic=None)
    loaded = again(program, tmp_path_factory.mktemp("p"))
    assert loaded.text() == program.text()
    torch.testing.assert_close(loaded(x), program(x), equal_nan=True, rtol=0, atol=0)


def test_what_cannot_be_saved_is_said_before_passes_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if a command did its work first, or if Python could not optimise what only saving refuses."""
    model = nn.Sequential(
        nn.Linear(4, 4), module(lambda self, x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 1])))
    ).eval()
    x = torch.randn(2, 4)
    exported = torch.export.export(model, (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    optimised = graphopt.optimize(model, "fuse-projections{allow_no_match=true}", inputs=x, dynamic=None)
    torch.testing.assert_close(optimised(x), model(x))
    with pytest.raises(
        CheckpointError, match=r"aten.segment_reduce.default.*lengths.*unchecked[\s\S]*in the model:"
    ):
        optimised.save(tmp_path / "p")

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("passes ran")

    monkeypatch.setattr("graphopt.cli.optimizing.run_passes", never)
    monkeypatch.setattr("graphopt.cli.optimizing.plan_passes", never)
    for command in (["optimize"], ["plan"]):
        passes = ["-p", "fuse-projections{allow_no_match=true}", "-o", str(tmp_path / "out")]
        status = run([*command, str(tmp_path / "model.pt2"), "--trust", *passes])
        assert status == CheckpointError.exit_code
        assert "aten.segment_reduce" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
