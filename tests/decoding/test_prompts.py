"""Prompts: outputs at the tokens that are read alone, and what is kept of a program from one call to the next."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.decoding import cached
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.kept import shared
from graphopt.ir.errors import CheckpointError
from graphopt.ir.program import Program
from graphopt.ir.running.execute import release
from graphopt.ir.weights import InMemory

NAMES = ["llama", "llama_tied", "gpt2", "gptj", "gemma3", "bloom", "qwen3", "phi3", "mixtral", "gpt_oss", "deepseek_v3"]  # fmt: skip


def decoders(program: Program, rows: int) -> tuple[CachedDecoder, CachedDecoder]:
    made = with_cache(program)
    return CachedDecoder(made, rows, 40), CachedDecoder(made, rows, 40)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_at_some_tokens_are_those_of_all(name: str, captured: Callable[[str], Program]) -> None:
    """Other tokens for each row, several of them, twice one after another; caches hold every token all the same."""
    program, _ = varied(name, captured(name))
    some, every = decoders(program, 2)
    torch.manual_seed(1)
    for read in (torch.tensor([[6], [2]]), torch.tensor([[0, 3], [5, 1]])):
        ids = torch.randint(3, 100, (2, 7))
        found, expected = some.extend(ids, read=read)["logits"], every.extend(ids)["logits"]
        chosen = torch.stack([row[places] for row, places in zip(expected, read, strict=True)])
        assert found.shape == chosen.shape
        assert (found - chosen).abs().max() <= 2e-5 * expected.abs().max()
        for decoder in (some, every):
            decoder.advance([7, 7])
    for buffer, values in some.buffers.items():
        assert (values - every.buffers[buffer]).abs().max() <= 2e-5 * values.abs().max().clamp(min=1), buffer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_what_only_outputs_need_is_not_computed_for_other_tokens(
    name: str, captured: Callable[[str], Program]
) -> None:
    """Neither the head, nor the last feed-forward, nor the last attention's output projection."""
    program, _ = varied(name, captured(name))
    work = []
    for decoder, read in zip(decoders(program, 1), (torch.tensor([[19]]), None), strict=True):
        with FlopCounterMode(display=False) as counted:
            decoder.extend(torch.randint(3, 100, (1, 20)), read=read)
        work.append(counted.get_total_flops())
    cached_program = with_cache(program)
    linears = [n for n in cached_program.nodes if "linear" in str(n.target)]
    vocabulary, hidden = linears[-1].args[1].meta["val"].shape
    head = 2 * vocabulary * hidden * 19
    assert work[1] - work[0] > head + 2 * hidden * hidden * 19


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_prompt_ends_where_nothing_more_is_stored(start: int, tmp_path: Path) -> None:
    """Upper layers that read a lower one's cache compute the last token of a prompt alone, and the text is the same."""
    import transformers

    torch.manual_seed(start)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "model")
    program = graphopt.optimize(graphopt.capture(tmp_path / "model"), f"share-caches{{start={start}}}")
    work = []
    for read in (torch.tensor([[59]]), None):
        decoder = CachedDecoder(with_cache(program), 1, 64)
        with FlopCounterMode(display=False) as counted:
            decoder.extend(torch.randint(3, 100, (1, 60)), read=read)
        work.append(counted.get_total_flops())
    # all layers are alike but for keys and values, which the upper ones do not make
    assert work[0] < (start + 0.5) / 6 * work[1]
    rows = [[t * t % 97 + 3 for t in range(40)], [9, 8, 7], [5]]
    expected = []
    for row in rows:
        text = list(row)
        for _ in range(8):
            with torch.no_grad():
                text.append(int(program(input_ids=torch.tensor([text]))["logits"][0, -1].argmax()))
        expected.append(text[len(row) :])
    for cache in (
        "full",
        "window{budget=60 block=7}",
        "heavy-hitters{budget=60 block=7}",
        "merge{budget=60 block=7}",
    ):
        written = graphopt.stream(program, rows, max_new_tokens=8, cache=cache, eos_token_id=None)
        list(written)
        assert [text[len(row) :] for text, row in zip(written.rows, rows, strict=True)] == expected, cache


def test_prompts_in_pieces(captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end in different pieces; the last tokens of all are read."""
    program, _ = varied("llama", captured("llama"))
    texts = {}
    for piece in (2048, 5, 3):
        monkeypatch.setattr(cached, "PIECE", piece)
        texts[piece] = generated(program, ROWS, 10)
    assert torch.equal(texts[2048], texts[5])
    assert torch.equal(texts[2048], texts[3])


def test_a_prompt_and_its_first_token_are_one_run(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = varied("llama", captured("llama"))
    widths = []
    forward = CachedDecoder.forward

    def counted(self: CachedDecoder, ids: torch.Tensor, *args: object, **options: object) -> object:
        widths.append(ids.shape[1])
        return forward(self, ids, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CachedDecoder, "forward", counted)
    stream = graphopt.stream(program, [[5, 9, 17, 40]], max_new_tokens=3, eos_token_id=None)
    list(stream)
    assert widths == [4, 1, 1]
    assert stream.statistics.steps == 3


@dataclass(frozen=True)
class Counted:
    """A source that counts how often it is read."""

    whole: InMemory
    reads: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def load(self) -> torch.Tensor:
        self.reads[0] += 1
        return self.whole.load()


def counting(program: Program) -> tuple[Program, list[int]]:
    reads = [0]
    for name, weight in program.weights.items():
        program.weights[name] = replace(weight, source=Counted(InMemory(weight.source.load().clone()), reads))
    program.changed()
    return program, reads


def text(program: Program, count: int = 8) -> list[int]:
    return [
        int(t) for t in graphopt.generate(program, [[5, 9, 17]], max_new_tokens=count, eos_token_id=None)[0]
    ]


def test_a_second_call_reads_no_weight(captured: Callable[[str], Program]) -> None:
    program, reads = counting(varied("llama", captured("llama"))[0])
    first = text(program)
    after = reads[0]
    assert after
    assert text(program) == first
    assert text(program, 12)[:11] == first, "caches of another length"
    assert reads[0] == after
    release(program)
    assert text(program) == first
    assert reads[0] > after


def test_of_several_ways_to_run_one_is_kept(captured: Callable[[str], Program]) -> None:
    program, _ = varied("llama", captured("llama"))
    made = with_cache(program)
    first = shared(made, "cpu", False, "auto")
    assert shared(made, "cpu", False, "auto") is first
    gone = weakref.ref(first)
    del first
    shared(made, "cpu", False, "exact")
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", ["exchanged", "written", "edited"])
def test_other_weights_write_another_text(how: str, captured: Callable[[str], Program]) -> None:
    program, _ = varied("llama", captured("llama"))
    for name, weight in program.weights.items():
        program.weights[name] = replace(weight, source=InMemory(weight.source.load().clone()))
    before = text(program)
    gone = weakref.ref(shared(with_cache(program), "cpu", False, "auto"))
    head = next(name for name, w in program.weights.items() if "lm_head" in w.name)
    values = program.weights[head].source.load()
    if how == "written":
        values.neg_()
    else:
        program.weights[head] = replace(program.weights[head], source=InMemory(-values))
    if how == "edited":
        program.changed()
        gc.collect()
        assert gone() is None, "an edit frees what was kept"
    after = text(program)
    assert after != before
    assert after == text(program.copy())
    gc.collect()
    assert gone() is None


def test_a_file_written_anew_is_no_longer_what_was_kept(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program, _ = varied("llama", captured("llama"))
    program.save(tmp_path / "saved")
    saved = graphopt.load(tmp_path / "saved")
    text(saved)
    (file,) = (tmp_path / "saved" / "weights").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    half = len(raw) // 2
    raw[half:] = bytes(len(raw) - half)
    file.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="has changed"):
        text(saved)


def test_what_is_kept_goes_with_the_program(captured: Callable[[str], Program]) -> None:
    program, _ = varied("llama", captured("llama"))
    text(program)
    gone = weakref.ref(shared(with_cache(program), "cpu", False, "auto").weights)
    del program
    gc.collect()
    assert gone() is None


def test_texts_at_the_same_time(captured: Callable[[str], Program]) -> None:
    """Streams that take turns, and threads, write what each writes alone."""
    program, _ = varied("llama", captured("llama"))
    prompts = [[5, 9, 17], [7, 7, 30], [12, 40, 3]]
    alone = [
        graphopt.generate(program, [p], max_new_tokens=10, eos_token_id=None)[0].tolist() for p in prompts
    ]
    streams = [graphopt.stream(program, [p], max_new_tokens=10, eos_token_id=None) for p in prompts]
    for _ in zip(*streams, strict=True):
        pass
    assert [s.rows[0] for s in streams] == alone
    found: dict[int, list[int]] = {}

    def write(number: int) -> None:
        row = graphopt.generate(program, [prompts[number]], max_new_tokens=10, eos_token_id=None)
        found[number] = row[0].tolist()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(3)] == alone
