"""Linear attention, short convolutions and their states in ONNX Runtime: any number of tokens, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from written_texts import ROWS, varied

import graphopt
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.ir.schema import operator_name


class Mixer(torch.nn.Module):
    """The four operators, each of which is an output."""

    def forward(
        self, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, x: Any, weight: Any, conv: Any, taken: Any,
        mask: Any = None,
    ) -> Any:  # fmt: skip
        operators = torch.ops.graphopt
        return {
            "y": operators.linear_attention(q, k, v, g, beta, state, mask),
            "after": operators.linear_attention_state(k, v, g, beta, state, taken, mask),
            "rows": operators.causal_conv1d(x, weight, None, conv, mask),
            "kept": operators.causal_conv1d_state(x, conv, taken, mask),
        }


def values(
    tokens: int, *, by_channel: bool, delta: bool, tree: bool, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    k = torch.nn.functional.normalize(normal(2, 2, tokens, 3), dim=-1)
    given = {
        "q": normal(2, 2, tokens, 3), "k": k, "v": normal(2, 4, tokens, 5),
        "g": -normal(2, 4, tokens, *[3] * by_channel).abs(), "state": normal(2, 4, 3, 5), "x": normal(2, 6, tokens),
        "weight": normal(6, 1, 4), "conv": normal(2, 6, 3),
        "taken": torch.arange(tokens) < torch.tensor([tokens, tokens // 2])[:, None],
    }  # fmt: skip
    if delta:
        given["beta"] = torch.rand(2, 4, tokens, generator=generator)
    if tree:
        mask = torch.eye(tokens, dtype=torch.bool).expand(2, -1, -1).clone()
        for row in range(2):
            for node in range(1, tokens):
                parent = int(torch.randint(-1, node, (), generator=generator))
                if parent >= 0:
                    mask[row, node] |= mask[row, parent]
        given["mask"], given["taken"] = mask, mask[:, tokens // 2]
    return given


@pytest.mark.parametrize(
    ("by_channel", "delta", "tree"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, False), (False, True, True),
     (True, True, True)],
)  # fmt: skip
def test_operators(by_channel: bool, delta: bool, tree: bool, tmp_path: Path) -> None:
    """One file for every length, around the chunks that it computes side by side; ragged rows, and trees."""
    import onnxruntime

    kind = {"by_channel": by_channel, "delta": delta, "tree": tree}
    given = values(9, **kind)
    if not delta:
        given["beta"] = None  # type: ignore[assignment]
    axis = {"x": 2, "taken": 1, "weight": None, "state": None, "conv": None}
    dynamic = {
        n: {} if n == "weight" else {0: "batch", **({axis.get(n, 2): "tokens"} if axis.get(n, 2) else {})}
        for n, value in given.items() if value is not None
    }  # fmt: skip
    if tree:
        dynamic["mask"] = {0: "batch", 1: "tokens", 2: "tokens"}
    program = graphopt.capture(Mixer(), given, dynamic=dynamic)
    program.lower("onnx", tmp_path / "mixer.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "mixer.onnx"))
    names = [i.name for i in session.get_inputs()]
    for tokens in (1, 2, 16, 17, 63, 64, 65, 130):
        given = values(tokens, **kind, seed=tokens)
        expected = Mixer()(**{"beta": None, **given})
        found = session.run(None, {name: given[name].numpy() for name in names})
        for output, value in zip(session.get_outputs(), found, strict=True):
            wanted = expected[output.name]
            assert numpy.allclose(value, wanted.numpy(), atol=5e-5), (output.name, tokens)


def written(session: Any, row: list[int], count: int, tree: bool = False) -> list[int]:
    """Continue a text: the prompt in one call, then token by token, states and caches handed from step to step."""
    inputs = {i.name: i for i in session.get_inputs()}
    kinds = {"tensor(float)": numpy.float32, "tensor(bool)": numpy.bool_, "tensor(int64)": numpy.int64}
    state = {
        name: numpy.zeros([s if isinstance(s, int) else 1 if d == 0 else 64 for d, s in enumerate(i.shape)],
                          kinds[i.type])
        for name, i in inputs.items() if "_cache_" in name or "_state_" in name
    }  # fmt: skip
    new, start, text = list(row), 0, []
    while len(text) < count:
        positions = numpy.arange(start, start + len(new))[None]
        given = {
            "input_ids": numpy.array([new]), "position_ids": positions, "cache_slots": positions,
            "taken": numpy.ones((1, len(new)), bool), "step_mask": numpy.tril(numpy.ones((1, len(new), len(new)), bool)),
        }  # fmt: skip
        found = session.run(None, {**{n: v for n, v in given.items() if n in inputs}, **state})
        outputs = dict(zip([o.name for o in session.get_outputs()], found, strict=True))
        state = {name: outputs[f"next_{name}"] for name in state}
        start += len(new)
        new = [int(outputs["logits"][0, -1].argmax())]
        text.extend(new)
    return text


@pytest.mark.parametrize(
    ("name", "option"),
    [("mamba2", ""), ("lfm2", ""), ("qwen3_next", ""), ("lfm2", "{tree=true}"), ("mamba", "")],
)
def test_text_is_that_of_transformers(
    name: str, option: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    import onnxruntime

    program, model = varied(name, captured(name))
    made = graphopt.optimize(program, f"insert-cache{option}")
    report = made.lower("onnx", tmp_path / "decoder.onnx")
    assert max(report.errors.values()) < 1e-3
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"))
    # longer than a chunk of the library
    prompt = [*ROWS[0], *torch.randint(3, 100, (70,)).tolist()] if name == "mamba2" else ROWS[0]
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    assert len(set(expected)) > 2
    assert written(session, prompt, 12) == expected


@pytest.mark.parametrize("name", ["falcon_h1", "kimi_linear"])
def test_without_a_cache(name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    """All tokens at once, more than a chunk of them; nothing is written out for each token of the example."""
    import onnxruntime

    program = captured(name)
    report = program.lower("onnx", tmp_path / "model.onnx")
    assert report.nodes["Scan"] == sum(
        operator_name(n.target) == "graphopt.linear_attention" for n in program.nodes
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    ids = torch.randint(3, 100, (2, 90))
    given = {"input_ids": ids.numpy(), "attention_mask": numpy.ones((2, 90), numpy.int64)}
    given["position_ids"] = numpy.arange(90)[None].repeat(2, 0)
    found = session.run(["logits"], {i.name: given[i.name] for i in session.get_inputs()})[0]
    assert numpy.allclose(found, program(input_ids=ids)["logits"].numpy(), atol=2e-4)


def test_genai_has_no_states(captured: Callable[[str], Program], tmp_path: Path) -> None:
    made = graphopt.optimize(captured("lfm2"), "insert-cache")
    with pytest.raises(LoweringError, match="this program has 2 states"):
        made.lower("genai", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
