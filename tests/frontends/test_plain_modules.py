"""Modules of plain torch, however they take their inputs: captured, equal at other sizes, what froze said with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_networks
import pytest
import torch
import zoo
from plain_networks import NETWORKS, Anything, Low, Ranking
from torch import nn

import graphopt
from graphopt.frontends.calling import by_name, uncompiled
from graphopt.frontends.torch_module import widen
from graphopt.ir.facts import Capture
from graphopt.ir.storage import load_program

# inputs that agree in a size have one name for it, and what varies varies
SIZES = {
    "transformer": {"src": ["batch", "sequence", 8], "tgt": ["batch", "sequence_2", 8]},
    "transformer_time_first": {"src": ["batch", "sequence", 8], "tgt": ["batch_2", "sequence", 8]},
    "transformer_one_row": {"src": ["batch", "sequence", 8], "tgt": ["batch", "sequence_2", 8]},
    "encoder": {"src": ["batch", "sequence", 8]},
    "encoder_time_first": {"src": ["batch", "sequence", 8]},
    "encoder_norm_first": {"src": ["batch", "sequence", 8]},
    "encoder_masked": {"src": ["batch", "sequence", 8], "src_key_padding_mask": ["batch", "sequence"]},
    "encoder_layer": {"src": ["batch", "sequence", 8]},
    "decoder_layer": {"tgt": ["batch", "sequence", 8], "memory": ["batch", "sequence_2", 8]},
    "attention": {
        "query": ["batch", "sequence", 8],
        "key": ["batch", "sequence_2", 8],
        "value": ["batch", "sequence_2", 8],
    },
    "ranking": {"dense": ["batch", 5], "categories": ["batch", "sequence"]},
    "ranking_one_row": {"dense": ["batch", 5], "categories": ["batch", "sequence"]},
    "bags": {"dense": ["batch", 5], "values": ["batch_2"], "offsets": ["batch"]},
    "graph": {"x": ["batch", 6], "edge_index": ["batch_2", "sequence"]},
    "graph_scatter": {"x": ["batch", 6], "edge_index": ["batch_2", "sequence"]},
    "anything": {"dense": ["batch", 5], "categories": ["batch", "sequence"]},
    "anything_by_name": {"dense": ["batch", 5], "categories": ["batch", "sequence"]},
    "adapter": {"input": ["batch", "sequence", 4]},
    "positional": {"x": ["batch", 4], "y": ["batch", 4]},
    "compiled": {"dense": ["batch", 5], "categories": ["batch", "sequence"]},
    "mixed": {"x": ["batch", "sequence", 4], "table": [1, "sequence_2", 4], "scale": [4]},
    "pieces": {"x": ["batch", 5, 4]},
    "halved": {"x": ["batch", 5, 4]},
    "lstm": {"x": ["batch", "sequence", 4]},
    "gru": {"x": ["batch", "sequence", 4]},
    "lstm_two_ways": {"x": ["batch", "sequence", 4]},
    "rnn": {"x": ["batch", "sequence", 4]},
}


def resized(program: graphopt.Program, inputs: dict[str, Any], step: int) -> dict[str, Any]:
    """Inputs of other sizes, each size by that many more, that mean the same kind of thing."""
    results = {}
    for name, value in inputs.items():
        spec = program.signature.inputs[name]
        for dim, size in enumerate(spec.shape):
            # only the two rows of an edge list are no size
            if isinstance(size, str) and not (name == "edge_index" and dim == 0):
                wanted = program.signature.nearest({size: value.shape[dim] + step})[size]
                value = torch.cat([value] * (1 + wanted // value.shape[dim]), dim).narrow(dim, 0, wanted)
        results[name] = value.sort().values if name == "offsets" else value
    return results


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_is_captured_with_the_sizes_that_it_lets_vary(name: str, tmp_path: Path) -> None:
    model, example = NETWORKS[name]()
    model.eval()
    program = graphopt.capture(model, example)
    assert {n: list(spec.shape) for n, spec in program.signature.inputs.items()} == SIZES[name]
    args = (example,) if isinstance(example, torch.Tensor) else example
    called, inputs = by_name(getattr(model, "_orig_mod", model), args)
    again = load_program(program.save(tmp_path / "p"))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for step in (0, 1, 4):
            given = resized(program, inputs, step)
            with torch.no_grad():
                expected = called(**given)
            for found in (program(**given), again(**given)):
                for one, other in zip(
                    found if isinstance(found, tuple) else (found,),
                    expected if isinstance(expected, tuple) else (expected,),
                    strict=True,
                ):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if not isinstance(example, dict):
        # by position, as the model takes them
        program(*args)


def test_every_network_is_expected() -> None:
    assert set(SIZES) == set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "size", "others", "line"),
    [
        ("halved", "dimension 1 of x is 5", True, "steps = int(x.shape[1])"),
        ("pieces", "dimension 1 of x is 5", False, "if x.shape[1] != 5:"),
        ("positional", "dimension 1 of x is 4", False, "return self.linear(x) * scale + y"),
        ("encoder", "dimension 2 of src is 8", False, "nn/functional.py"),
    ],
)
def test_what_froze_is_said_with_the_line(name: str, size: str, others: bool, line: str, capsys: Any) -> None:
    model, example = NETWORKS[name]()
    program = graphopt.capture(model, example)
    notes = [note for note in program.facts[Capture].fixed_sizes if note.startswith(size)]
    assert len(notes) == 1
    assert ("although the model takes others" in notes[0]) is others
    assert line in notes[0]
    assert notes[0] in str(program)
    assert notes[0] not in repr(program)


def test_inspect_shows_what_froze(tmp_path: Path, told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.cli.running import run

    path = graphopt.capture(*NETWORKS["halved"]()).save(tmp_path / "p")
    notes = told("inspect", path)["fixed_sizes"]
    assert any("steps = int(x.shape[1])" in note for note in notes)
    assert run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(note in shown for note in notes)


def test_sizes_that_vary_are_not_said_to_be_fixed() -> None:
    program = graphopt.capture(*NETWORKS["encoder"]())
    assert all("dimension 2" in note for note in program.facts[Capture].fixed_sizes)
    fixed = graphopt.capture(*NETWORKS["encoder"](), dynamic=None)
    assert not (fixed.facts.get(Capture) or Capture()).fixed_sizes, "nobody asked for sizes that vary"


# -- a batch of one ---------------------------------------------------------------------------------------


def test_a_batch_of_one_is_widened_input_by_input() -> None:
    model, (x, table, scale) = (
        plain_networks.Mixed(),
        (torch.randn(1, 5, 4), torch.randn(1, 9, 4), torch.randn(4)),
    )
    wide = widen({"x": x, "table": table, "scale": scale}, model)
    assert [tuple(v.shape) for v in wide.values()] == [(3, 5, 4), (1, 9, 4), (4,)]
    assert torch.equal(wide["x"][2], x[0])


class _Time(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.cumsum(0) + y[:1]


def test_a_second_dimension_of_one_is_widened_where_the_first_is_longer() -> None:
    wide = widen({"x": torch.randn(7, 1, 4), "y": torch.randn(5, 1, 4)}, _Time())
    assert [tuple(v.shape) for v in wide.values()] == [(7, 3, 4), (5, 3, 4)]
    program = graphopt.capture(_Time(), (torch.randn(7, 1, 4), torch.randn(5, 1, 4)))
    assert program(torch.randn(6, 2, 4), torch.randn(3, 2, 4)).shape == (6, 2, 4)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + y[0]


def test_widening_changes_no_buffer() -> None:
    model = _Counting()
    widen({"x": torch.randn(1, 3), "y": torch.randn(2, 3)}, model)
    assert model.calls.item() == 0
    with pytest.raises(graphopt.CaptureError, match="calls"):
        graphopt.capture(model, (torch.randn(1, 3), torch.randn(2, 3)))
    assert model.calls.item() == 0


# -- how inputs are given ---------------------------------------------------------------------------------


class _Sum(nn.Module):
    def forward(self, first: torch.Tensor, *rest: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (first + sum(rest)) * scale


def test_inputs_without_a_name_get_one() -> None:
    x = torch.randn(4, 3)
    program = graphopt.capture(_Sum(), ((x, x + 1, x + 2), {"scale": x}))
    assert list(program.signature.inputs) == ["first", "rest_0", "rest_1", "scale"]
    torch.testing.assert_close(program(x, x + 1, x + 2, scale=x), (3 * x + 3) * x)
    torch.testing.assert_close(program(first=x, rest_0=x, rest_1=x, scale=x), 3 * x * x)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(graphopt.UsageError, match="do not fit _Sum.forward: missing a required"):
        graphopt.capture(_Sum(), (torch.randn(2, 3),))


def test_a_view_shares_everything_with_its_module() -> None:
    model = Anything(Ranking()).train()
    view, inputs = by_name(model, NETWORKS["ranking"]()[1])
    assert list(inputs) == ["dense", "categories"]
    assert list(view.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    graphopt.capture(model, NETWORKS["ranking"]()[1])
    assert model.training
    assert model.inner.training
    assert type(model) is Anything
    assert "forward" not in vars(model)


def test_programs_of_wrappers_have_the_wrappers_weights() -> None:
    model, example = NETWORKS["adapter"]()
    program = graphopt.capture(model, example)
    names = {n for w in program.weights.values() for n in w.all_names}
    assert names <= set(model.state_dict())
    assert "inner.0.lora_A.default.weight" in names


class _Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outside = torch.compile(Ranking())
        self.inside = Ranking()
        self.inside.compile()

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        return self.outside(dense, categories) + self.inside(dense, categories)


def test_compiled_parts_are_captured_as_they_were_written() -> None:
    model = _Compiled().eval()
    before = (model.outside, model.inside._compiled_call_impl)
    example = NETWORKS["ranking"]()[1]
    program = graphopt.capture(model, example)
    assert (model.outside, model.inside._compiled_call_impl) == before
    assert not any("_orig_mod" in w.name for w in program.weights.values())
    with uncompiled(model), torch.no_grad():
        expected = model(*example)
    torch.testing.assert_close(program(*example), expected)


class _Adapted(nn.Module):
    """Wraps a model of transformers as PEFT does."""

    def __init__(self, model: Any, twice: bool = False):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.twice = twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.base_model["model"](*args, **kwargs)
        if self.twice:
            result.logits = result.logits * 2
        return result


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapted_transformers_model_is_captured_like_the_model(compiled: bool) -> None:
    model = zoo.make("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Low(layer.self_attn.q_proj)
    adapted: Any = _Adapted(model).eval()
    ids = torch.randint(3, 90, (1, 7))
    program = graphopt.capture(torch.compile(adapted) if compiled else adapted, {"input_ids": ids})
    assert list(program.signature.inputs) == ["input_ids", "attention_mask"]
    assert [b.kind for b in program.anatomy.blocks] == ["attention", "ffn"] * 2
    names = {n for w in program.weights.values() if w.persistent for n in w.all_names}
    assert names == set(adapted.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            program(input_ids=ids)["logits"], adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
    assert next(iter(graphopt.capture(adapted, ids).signature.inputs)) == "input_ids"


# -- recurrent layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str)
def test_states_of_recurrent_layers_are_right_at_every_length(kind: Any, options: dict[str, Any]) -> None:
    model = kind(4, 3, **options)
    program = graphopt.capture(model, torch.randn(6, 2, 4))
    for length, batch in ((1, 2), (9, 1), (6, 5)):
        x = torch.randn(length, batch, 4)
        with torch.no_grad():
            expected, found = model(x), program(x)
        for one, other in zip(
            torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_a_projected_lstm_is_right() -> None:
    model = nn.LSTM(4, 6, proj_size=3, batch_first=True)
    program = graphopt.capture(model, torch.randn(2, 5, 4))
    x = torch.randn(3, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(program(x)[0], model(x)[0])


def test_tracing_leaves_torchs_own_decompositions() -> None:
    before = dict(torch.ops.aten.lstm.input.py_kernels)
    graphopt.capture(nn.LSTM(4, 3), torch.randn(6, 2, 4))
    assert torch.ops.aten.lstm.input.py_kernels == before


def test_a_recurrent_program_goes_on_to_a_module_and_an_exported_program() -> None:
    model, x = NETWORKS["lstm"]()
    program = graphopt.capture(model, x)
    longer = torch.randn(3, 9, 4)
    with torch.no_grad():
        expected = model(longer)
        torch.testing.assert_close(program.module()(longer), expected)
        torch.testing.assert_close(program.exported_program().module()(x=longer)["output"], expected)
