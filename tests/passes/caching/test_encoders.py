"""Decoders that follow an encoder: its keys and values are computed once, and the text is that of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.drafters import DraftProgram
from graphopt.ir.errors import UsageError
from graphopt.ir.facts import CrossCache
from graphopt.ir.program import Program

SMALL = {"vocab_size": 96, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.4,
}  # fmt: skip
CONFIGS = {
    "t5": transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        initializer_factor=3.0, **SMALL,
    ),
    "bart": transformers.BartConfig(**BART, **SMALL, forced_eos_token_id=None, tie_word_embeddings=False),
    "whisper": transformers.WhisperConfig(
        **BART, **SMALL, num_mel_bins=8, max_source_positions=20, max_target_positions=64, bos_token_id=0,
        begin_suppress_tokens=None, suppress_tokens=None,
    ),
}  # fmt: skip
CLASSES = {
    "t5": transformers.T5ForConditionalGeneration,
    "bart": transformers.BartForConditionalGeneration,
    "whisper": transformers.WhisperForConditionalGeneration,
}
NEW = 24


@cache
def made(name: str) -> tuple[Any, Program]:
    torch.manual_seed(0)
    model = CLASSES[name](CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # embeddings that dominate the stream would repeat one token
                spread = 0.2 if parameter.shape[0] > 48 else 0.6
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=0, pad_token_id=0)
    example = {name: value[:2] for name, value in read(name).items() if name != "attention_mask"}
    example["decoder_input_ids"] = torch.tensor([[0, 5, 9], [0, 8, 4]])
    return model, graphopt.capture(model, example)


def read(name: str) -> dict[str, torch.Tensor]:
    """Return what three rows of an encoder read, of different lengths where they may."""
    generator = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 40, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = mask[2, 7:] = 0
    return {"input_ids": torch.randint(3, 96, (3, 9), generator=generator), "attention_mask": mask}


def written(program: Program, name: str, **options: Any) -> torch.Tensor:
    given = read(name)
    inputs = {n: given.pop(n) for n in list(given) if n == "input_features"}
    return graphopt.generate(
        program, **given, inputs=inputs, max_new_tokens=NEW, eos_token_id=None, **options
    )[:, 1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_that_of_transformers(name: str, tmp_path: Any) -> None:
    """Three rows with inputs of different lengths; with candidates; with another beginning; saved and loaded."""
    model, program = made(name)
    with torch.no_grad():
        expected = model.generate(
            **read(name), decoder_input_ids=torch.zeros(3, 1, dtype=torch.int64), max_new_tokens=NEW,
            do_sample=False, eos_token_id=None,
        )[:, -NEW:]  # fmt: skip
    assert len(set(expected.flatten().tolist())) > 8
    assert torch.equal(written(program, name), expected)
    cached = graphopt.load(graphopt.optimize(program, "insert-cache{tree=true}").save(tmp_path / "saved"))
    assert torch.equal(written(cached, name, strategy="token-recycling"), expected)
    further = torch.cat([torch.zeros(3, 1, dtype=torch.int64), expected[:, :5]], 1)
    assert torch.equal(written(cached, name, decoder_input_ids=further)[:, 5:NEW], expected[:, 5:])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_runs_once(name: str) -> None:
    """A step reads keys and values that were computed, and neither the encoder's weights nor its inputs."""
    _, program = made(name)
    cached = graphopt.optimize(program, "insert-cache")
    cross = cached.facts[CrossCache]
    assert len(cross.outputs) == 4
    decoder = CachedDecoder(cached, 3, 12)
    decoder.encode(read(name))
    decoder.extend(torch.zeros(3, 1, dtype=torch.int64))
    step = decoder.graph(decoder.outputs, [*cross.outputs])
    assert "input_ids" not in step.inputs
    assert "input_features" not in step.inputs
    whole = sum(n.op == "call_function" for n in cached.graph.nodes)
    assert len(step.constants) < 0.8 * len(cached.weights)
    assert sum(n.op == "call_function" for n in step._graph.nodes) < 0.7 * whole


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_draft_reads_what_the_program_has_read(name: str) -> None:
    """The program as its own draft proposes nothing but what it accepts."""
    _, program = made(name)
    given = read(name)
    inputs = {n: given.pop(n) for n in list(given) if n == "input_features"}
    stream = graphopt.stream(
        program,
        **given,
        inputs=inputs,
        max_new_tokens=NEW,
        eos_token_id=None,
        strategy=DraftProgram(program, tokens=3),
    )
    assert sum(len(tokens) for _, tokens in stream) == 3 * NEW
    assert stream.statistics.notes == []
    assert min(stream.statistics.acceptance) == 1.0


def test_what_is_given_to_an_encoder() -> None:
    """Nothing to read, rows that differ, inputs that do not exist, and an encoder where there is none."""
    _, program = made("bart")
    text = read("bart")["input_ids"]
    with pytest.raises(UsageError, match="nothing to read"):
        graphopt.generate(program, max_new_tokens=3)
    with pytest.raises(UsageError, match="different numbers of rows"):
        graphopt.generate(program, text, attention_mask=torch.ones(2, 9), max_new_tokens=3)
    with pytest.raises(UsageError, match="no input 'pixels'"):
        graphopt.generate(program, text, inputs={"pixels": text}, max_new_tokens=3)
    with pytest.raises(UsageError, match="decoder_input_ids has 1 rows"):
        graphopt.generate(program, text, decoder_input_ids=[[0]], max_new_tokens=3)
    _, speech = made("whisper")
    with pytest.raises(UsageError, match="does not read tokens"):
        graphopt.generate(speech, text, max_new_tokens=3)
