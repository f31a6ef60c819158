"""Caches at real sizes: what is checked on one layer of each kind, and defaults of configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from amounts import examples
from caching_networks import TwoTypes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.ir.errors import PassRefusedError
from graphopt.ir.facts import KVCache
from graphopt.ir.program import Program
from graphopt.ir.schema import arguments, is_operator
from graphopt.passes.caching import reducing


def decoder(config: Any, model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**options)).eval()


@pytest.mark.parametrize("kinds", [1, 2])
def test_many_layers_are_checked_by_one_of_each_kind(kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of weights; the program itself keeps all its layers and writes the model's text."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.setattr(reducing, "LARGE", 20_000)
    model = decoder(
        Qwen2Config, Qwen2ForCausalLM, vocab_size=101, hidden_size=36, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=9, num_key_value_heads=3, initializer_range=0.3, max_position_embeddings=64,
        use_sliding_window=True, sliding_window=5, layer_types=(["full_attention", "sliding_attention"] * 3)[:: 3 - kinds] * (3 - kinds),
    )  # fmt: skip
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})
    small = reducing.reduced(program)
    assert small is not None and len(small.anatomy.layers) == kinds
    assert len(program.anatomy.layers) == 6
    made = graphopt.optimize(program, "insert-cache")
    assert made.facts[KVCache].layers == 6
    assert made.report.passes[-1].checks == 1
    ids = torch.tensor([[5, 9, 17, 40, 3, 8, 22]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(graphopt.generate(made, ids, max_new_tokens=20, eos_token_id=None), expected)
    assert len(set(expected[0, 7:].tolist())) > 4


def test_a_configuration_with_default_values() -> None:
    """GPT-2 as its class describes it: one matrix, with as many rows of bias, makes queries, keys and values."""
    from transformers import GPT2Config

    from graphopt.frontends.huggingface import capture_configuration

    program = capture_configuration(GPT2Config(n_layer=2, architectures=["GPT2LMHeadModel"]))
    small = reducing.reduced(program)
    assert small is not None and len(small.anatomy.layers) == 1
    table = small.weight_node("transformer.wte.weight").meta["val"]
    assert table.shape[0] <= reducing.ROWS, "the table of a whole vocabulary is kept"
    assert reducing.elements(small) < reducing.elements(program) / 4


GQA = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {
    "Mistral": {},
    "Gemma2": BOTH,
    "Gemma3Text": BOTH,
    "Cohere2": BOTH,
    "Exaone4": BOTH,
}


def windows(program: Program) -> set[int | None]:
    return {arguments(n)["window"] for n in program.nodes if is_operator(n, "graphopt.attention")}


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_that_a_configuration_has_by_default(name: str) -> None:
    """4096 tokens are seen by no example; it is known all the same, and short caches are no obstacle."""
    import transformers

    model = decoder(
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM"),
        **{**GQA, **WINDOWED[name]},
    )
    assert model.config.sliding_window == 4096
    program = graphopt.capture(
        model, {"input_ids": torch.randint(3, 100, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    )
    assert windows(program) == ({4096} if name == "Mistral" else {4096, None})
    made = graphopt.optimize(program, "insert-cache{max_length=48}")
    assert made.facts[KVCache].limit is None
    ids = torch.tensor([[5, 9, 17, 40, 3, 8, 22]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(graphopt.generate(made, ids, max_new_tokens=20, eos_token_id=None), expected)


def test_text_past_a_window() -> None:
    """As long a text as the window and longer, rows of different lengths, in a cache and out of one."""
    from transformers import MistralConfig, MistralForCausalLM

    model = decoder(MistralConfig, MistralForCausalLM, **GQA, sliding_window=16)
    program = graphopt.capture(
        model, {"input_ids": torch.randint(3, 100, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    )
    ids, mask = torch.tensor([[5, 9, 17, 40, 3], [0, 0, 0, 7, 31]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    made = graphopt.optimize(program, "insert-cache{max_length=48}")
    for form in (program, made):
        found = graphopt.generate(form, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=None)
        assert torch.equal(found, expected)
    assert len(set(expected[0].tolist())) > 8


class Windowed(nn.Module):
    """One attention whose mask is written out, with a number in it that no example reaches."""

    def __init__(self, form: str, window: int):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.window = form, window
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)

    def seen(self, length: int) -> torch.Tensor:
        """Return which key each query sees."""
        q, k = torch.arange(length)[:, None], torch.arange(length)[None]
        return {
            "after": lambda: (k <= q) & (k > q - self.window),
            "from": lambda: (k <= q) & (k >= q - self.window),
            "distance": lambda: (k <= q) & (q - k < self.window),
            "both ways": lambda: (q - k).abs() <= self.window,
            "chunk": lambda: (k <= q) & (k // self.window == q // self.window),
            "all but": lambda: (k <= q) & ((q - k < self.window) | (k < 4)),
        }[self.form]()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.embed(input_ids)).chunk(3, -1))
        hidden = torch.where(self.seen(input_ids.shape[1]), 0.0, -30000.0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        return {"logits": self.head(mixed.squeeze(1))}


FORMS = {"after": 0, "from": 1, "distance": 0, "both ways": 1, "chunk": None, "all but": None}


@settings(max_examples=examples(12), deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), window=st.one_of(st.integers(3, 200), st.integers(1490, 100_000)))
@example("all but", 5)
@example("all but", 2493)
@example("after", 1501)
@example("from", 4096)
def test_windows_are_what_the_mask_says(form: str, window: int) -> None:
    """Whatever way it is written; what is no window stays a bias."""
    program = graphopt.capture(Windowed(form, window).eval(), {"input_ids": torch.randint(0, 20, (2, 6))})
    extra = FORMS[form]
    assert windows(program) == ({None} if extra is None else {window + extra})
    (core,) = (n for n in program.nodes if is_operator(n, "graphopt.attention"))
    assert (arguments(core)["bias"] is None) == (extra is not None)


@settings(max_examples=examples(12), deadline=None)
@given(positions=st.integers(12, 3000), offset=st.integers(0, 2))
def test_positions_end_where_their_table_ends(positions: int, offset: int) -> None:
    """Tables that are read at one place say nothing; the last position is taken, one more is refused."""
    model = TwoTypes(positions, offset).eval()
    program = graphopt.capture(model, {"input_ids": torch.randint(0, 20, (2, 6))})
    made = graphopt.optimize(program, f"insert-cache{{max_length={positions}}}")
    assert made.facts[KVCache].limit == positions
    text = [3, 5, 9]
    for _ in range(8):
        text.append(int(model(torch.tensor([text]))["logits"][0, -1].argmax()))
    found = graphopt.generate(made, [[3, 5, 9]], max_new_tokens=8, eos_token_id=None)
    assert found[0].tolist() == text
    with pytest.raises(PassRefusedError, match=f"positions for {positions} tokens, {positions + 1} are more"):
        graphopt.optimize(program, f"insert-cache{{max_length={positions + 1}}}")


def test_caches_that_do_not_fit_are_refused_before_they_are_made() -> None:
    """Wrong if the memory were asked for first, which ends the process on some machines."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = decoder(LlamaConfig, LlamaForCausalLM, **GQA)
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})
    with pytest.raises(PassRefusedError, match=r"99,999,999,999 slots cannot be compared here: [\d,]+ GB"):
        graphopt.optimize(program, "insert-cache{max_length=99999999999}")


def test_reduction_of_values_whose_last_size_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix with many rows whose results are turned, as a convolution along the tokens needs them."""
    monkeypatch.setattr(reducing, "LARGE", 0)
    config = transformers.Lfm2Config(
        vocab_size=600, hidden_size=192, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    program = graphopt.capture(model, {"input_ids": torch.arange(9)[None]}, compare=False)
    cached = graphopt.optimize(program, "insert-cache")
    assert "conv_state_0" in cached.signature.inputs
