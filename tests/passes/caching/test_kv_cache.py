"""Caches that are put in: text token for token as transformers writes it, piece by piece as in one go, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from amounts import examples
from builders import tokens
from drawn_decoders import Decoder, alike, decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from written_texts import NEW, ROWS, generated, padded, varied

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.ir.checking.report import PassReport
from graphopt.ir.errors import ContractError, PassRefusedError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator
from graphopt.passes.caching.comparing import compare_with_cache
from graphopt.passes.caching.insert_cache import InsertCache

DECODERS = [n for n, case in zoo.CASES.items() if case.model.endswith(("CausalLM", "LMHeadModel"))]


def reference(model: Any, rows: list[list[int]], count: int = NEW) -> torch.Tensor:
    ids, mask = padded(rows)
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )[:, ids.shape[1] :]


SEEN: dict[str, int] = {}


@pytest.mark.parametrize("name", DECODERS)
def test_text_is_that_of_transformers(name: str, captured: Callable[[str], Program]) -> None:
    """Three rows side by side, one of a single token, padded on the left, and the first of them alone."""
    program, model = varied(name, captured(name))
    expected = reference(model, ROWS)
    assert torch.equal(generated(program, ROWS), expected)
    if name in ("llama", "gemma3", "bloom", "gpt_oss"):
        assert torch.equal(generated(program, ROWS[:1]), reference(model, ROWS[:1]))
    SEEN[name] = max(len(set(row.tolist())) for row in expected)


def test_the_texts_say_something() -> None:
    """One token over and over would be equal whatever the caches held."""
    if len(SEEN) == len(DECODERS):
        assert sum(count >= 4 for count in SEEN.values()) >= 25, SEEN


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "gpt_oss", "deepseek_v3"])
def test_forms_of_the_cache_agree(name: str, captured: Callable[[str], Program], tmp_path: Any) -> None:
    """Growing, of fixed length, for trees, and after it was saved and loaded."""
    program, model = varied(name, captured(name))
    expected = reference(model, ROWS)
    for text in (
        "insert-cache",
        "insert-cache{max_length=30}",
        "insert-cache{tree=true max_length=30}",
    ):
        made = graphopt.optimize(program, text)
        assert torch.equal(generated(made, ROWS), expected), text
    again = graphopt.load(made.save(tmp_path / "saved"))
    assert torch.equal(generated(again, ROWS), expected)
    with pytest.raises(UsageError, match="caches have 30 slots"):
        generated(made, ROWS, 24)
    with pytest.raises(graphopt.LoweringError, match="cache"):
        made.save_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("form", ["max_length=30", "tree=true"])
def test_onnx_runtime_writes_the_same(form: str, captured: Callable[[str], Program], tmp_path: Any) -> None:
    """Prompt and tokens from one file, caches handed from step to step."""
    import onnxruntime

    program, model = varied("llama", captured("llama"))
    made = graphopt.optimize(program, f"insert-cache{{{form}}}")
    made.lower("onnx", tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"))
    names = [i.name for i in session.get_inputs()]
    state = {n: torch.zeros(1, 2, 30, 8).numpy() for n in names if "_cache_" in n}
    new, start = list(ROWS[0]), 0
    written: list[int] = []
    while len(written) < 12:
        positions = torch.arange(start, start + len(new))[None]
        given = {"input_ids": torch.tensor([new]), "position_ids": positions, "cache_slots": positions}
        given["step_mask"] = torch.ones(1, len(new), len(new), dtype=torch.bool).tril()
        fed = {n: given[n].numpy() for n in names if n in given}
        values = session.run(None, {**fed, **state})
        found = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
        state = {n: found[f"next_{n}"] for n in state}
        start += len(new)
        new = [int(found["logits"][0, -1].argmax())]
        written.extend(new)
    assert written == reference(model, ROWS[:1], 12)[0].tolist()


@pytest.mark.parametrize(
    "passes",
    ["skip-layers{remove=1}", "fuse-projections", "fold-norms", "split-ffn{widths=[1/2 1]}",
     "shard-tensor-parallel{size=2}", "shard-tensor-parallel{size=2}, drop-sync-points{fraction=1 allow_no_match=true}"],
)  # fmt: skip
def test_after_other_passes(passes: str, captured: Callable[[str], Program]) -> None:
    """The cached form of a changed program writes what the changed program writes, computed whole each time."""
    program, _ = varied("llama", captured("llama"))
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    changed = graphopt.optimize(program, passes, data=data)
    row = list(ROWS[0])
    for _ in range(8):
        row.append(int(changed(input_ids=torch.tensor([row]))["logits"][0, -1].argmax()))
    assert generated(changed, ROWS[:1], 8)[0].tolist() == row[len(ROWS[0]) :]


@settings(max_examples=examples(18), deadline=None)
@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    name=st.sampled_from(["mistral", "gemma2", "falcon_alibi"]),
    seed=st.integers(0, 99),
)
def test_any_pieces_give_the_whole(
    pieces: list[int], rows: int, name: str, seed: int, captured_programs: Any
) -> None:
    """Logits of pieces are those of all tokens at once, whatever the pieces."""
    program = captured_programs(name)
    made = program.derived("test cache", lambda: graphopt.optimize(program, "insert-cache"))
    ids = torch.randint(3, 100, (rows, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    whole = program(input_ids=ids)["logits"]
    decoder = CachedDecoder(made, rows, sum(pieces) + 2)
    found = []
    for part in ids.split(pieces, dim=1):
        found.append(decoder.extend(part)["logits"])
        decoder.advance([part.shape[1]] * rows)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-4)


@settings(max_examples=examples(15), deadline=None)
@given(
    drawn=decoders(),
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    options=st.sampled_from(["", "{tree=true}", "{max_length=24}"]),
)
def test_any_decoder_in_any_pieces(drawn: Decoder, pieces: list[int], rows: int, options: str) -> None:
    """Exact in float64; wrong if a key were stored in another slot, rotated by another position, or seen too early."""
    program = drawn.unmasked
    made = graphopt.optimize(program, f"insert-cache{options}", verify="off")
    ids = tokens(rows, sum(pieces), seed=drawn.seed)["input_ids"]
    decoder = CachedDecoder(made, rows, 24)
    found = []
    for part in ids.split(pieces, dim=1):
        found.append(decoder.extend(part)["logits"].clone())
        decoder.advance([part.shape[1]] * rows)
    assert alike(torch.cat(found, 1), program(input_ids=ids)["logits"])


@pytest.fixture(scope="session")
def captured_programs(captured: Callable[[str], Program]) -> Callable[[str], Program]:
    return captured


def test_wrong_caches_are_caught(captured: Callable[[str], Program]) -> None:
    """The comparison in pieces must see a token stored in a wrong slot, and one seen that should not be."""
    program = captured("llama")
    made = graphopt.optimize(program, "insert-cache", verify="off")
    assert compare_with_cache(program, made).error < 1e-12
    for operator, change in (
        ("graphopt.cache_store", lambda node: (node.args[0], node.args[1], shifted(node))),
        ("graphopt.cache_visible", lambda node: (shifted(node, 0), *node.args[1:])),
    ):
        broken = made.copy()

        def shifted(node: Any, place: int = 2, broken: Program = broken) -> Any:
            with broken.edit.before(node):
                return broken.edit.call(torch.ops.aten.add.Tensor, node.args[place], 1)

        node = next(n for n in broken.nodes if is_operator(n, operator))
        node.args = change(node)
        broken.changed()
        assert not compare_with_cache(program, broken).error < 1e-3, operator


def test_what_has_no_such_form_is_refused(captured: Callable[[str], Program]) -> None:
    for name, reason in (
        ("bert", "sees later tokens"),
        ("vit", "its rows have 3"),
    ):
        with pytest.raises(PassRefusedError, match=reason):
            graphopt.optimize(captured(name), "insert-cache")
    with pytest.raises(PassRefusedError, match="positions for 64 tokens, 65 are more"):
        graphopt.optimize(captured("mpt"), "insert-cache{max_length=65}")
    done = graphopt.optimize(captured("llama"), "insert-cache")
    with pytest.raises(graphopt.PipelineError):
        graphopt.optimize(done, "insert-cache")


@pytest.mark.parametrize("layers", ["[1]", "[1 2]", "[0 3]"])
def test_layers_skipped_while_decoding_alone(layers: str) -> None:
    """All layers read the prompt; tokens after it pass the kept ones, over the caches that the prompt left there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, initializer_range=0.3)
    ).eval()  # fmt: skip
    program = graphopt.capture(
        model, {"input_ids": torch.randint(3, 100, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    )
    done = graphopt.optimize(program, f"skip-layers{{layers={layers} phase=decode}}")
    ids = torch.tensor(ROWS[:1])
    assert torch.equal(done(input_ids=ids)["logits"], program(input_ids=ids)["logits"])
    fewer = graphopt.optimize(program, f"skip-layers{{layers={layers}}}")
    assert torch.allclose(
        done(input_ids=ids, decoding=1)["logits"], fewer(input_ids=ids)["logits"], atol=1e-5
    )
    # by hand: two programs, the caches of the kept layers handed over after the prompt
    whole, short = (CachedDecoder(graphopt.optimize(p, "insert-cache"), 1, 30) for p in (program, fewer))
    token = int(whole.prefill(ROWS[:1])[0]["logits"].argmax())
    kept = [n for n in range(4) if str(n) not in layers]
    for name, buffer in short.buffers.items():
        kind, _, number = name[0].rpartition("_")
        source = next(b for key, b in whole.buffers.items() if key[0] == f"{kind}_{kept[int(number)]}")
        buffer.copy_(source)
    short.lengths = list(whole.lengths)
    expected = [token]
    while len(expected) < 12:
        expected.append(int(short.extend(torch.tensor([[expected[-1]]]))["logits"][0, -1].argmax()))
        short.advance([1])
    assert generated(done, ROWS[:1], 12)[0].tolist() == expected
    assert generated(done, ROWS, 12)[0].tolist() == expected, "another row changed it"
    assert generated(done, ROWS[:1], 12, strategy="prompt-lookup")[0].tolist() == expected
    assert expected != generated(program, ROWS[:1], 12)[0].tolist(), "the layers do nothing here"
    with pytest.raises(graphopt.LoweringError):
        done.save_pretrained("nowhere")


class Biased(nn.Module):
    """Attention with a bias for each pair of query and key, by their distance and, apart from it, by the query."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)
        self.slopes = nn.Parameter(torch.tensor([0.3, -0.7]))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        places = torch.arange(length)
        distance = (places[:, None] - places[None]).float()
        bias = self.slopes[:, None, None] * distance.abs().sqrt() * (1 + places[:, None] % 3)
        bias = bias.masked_fill(distance < 0, float("-inf"))[None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return {"logits": self.head(x + mixed.transpose(1, 2).reshape(batch, length, 8)) * 9}  # type: ignore[return-value]


@pytest.mark.parametrize("tree", ["", "tree=true "])
@pytest.mark.parametrize("what", ["bias", "rotary"])
def test_positions_that_are_no_input(what: str, tree: str, captured: Callable[[str], Program]) -> None:
    """Tables for all places, read where tokens stand: of queries and keys, and of rotations."""
    model = Biased().eval() if what == "bias" else zoo.make("llama").eval()
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 20, (2, 6))})
    assert "position_ids" not in program.signature.inputs
    made = graphopt.optimize(program, f"insert-cache{{{tree}max_length=24}}")
    rows = [[3, 5, 9, 4], [7]]
    found = graphopt.generate(made, rows, max_new_tokens=9, eos_token_id=None)[:, 4:]
    for number, row in enumerate(rows):
        text = list(row)
        for _ in range(9):
            text.append(int(program(input_ids=torch.tensor([text]))["logits"][0, -1].argmax()))
        assert found[number].tolist() == text[len(row) :]
    assert what == "rotary" or len(set(found[0].tolist())) > 1


class Mixing(nn.Module):
    """A decoder that also takes the mean of all tokens up to each, which no cache of keys carries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head(x + x.cumsum(1))


def test_tokens_that_meet_elsewhere_are_noticed() -> None:
    program = graphopt.capture(Mixing().eval(), {"input_ids": torch.randint(0, 20, (2, 6))})
    with pytest.raises(PassRefusedError, match="are mixed outside of attention"):
        graphopt.optimize(program, "insert-cache")
    made = program.copy()
    InsertCache()._insert(made)
    with pytest.raises(ContractError, match="in chunks differs"):
        InsertCache().check(program, made, PassReport("insert-cache", "", ""))


def test_bad_input_is_said(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    for given_, message in (
        ({"input_ids": [[101]]}, "token 101, the program knows 0 to 100"),
        ({"input_ids": [[]]}, "at least one token"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "1 dimensions"),
        ({"input_ids": [[3]], "temperature": -1.0}, "0 or more"),
        ({"input_ids": [[3]], "top_p": 0.0}, "above 0"),
        ({"input_ids": [[3]], "strategy": "medusas"}, "no strategy"),
        ({"input_ids": [[3]], "dtype": "int8"}, "dtype is"),
        ({"input_ids": [[3]], "eos_token_id": "none"}, "eos_token_id is 'none'"),
    ):
        with pytest.raises(UsageError, match=message):
            graphopt.generate(program, **{"max_new_tokens": 4, **given_})
    with pytest.raises(UsageError, match="positions for 64"):
        graphopt.generate(captured("gpt2"), [[3]], max_new_tokens=64)
