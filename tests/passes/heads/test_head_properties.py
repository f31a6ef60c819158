"""What is added to any decoder leaves what it says bit for bit, and says what its formula does."""

from __future__ import annotations

import copy

import torch
from amounts import examples
from builders import tokens
from drawn_decoders import SIZES, Decoder, alike, decoders, recorded, shaken, weight_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import graphopt
from graphopt.ir.facts import Vocabulary
from graphopt.ir.program import Program

SETTINGS = settings(max_examples=examples(24), deadline=None)
SEEDS = st.integers(0, 1 << 20)
HEADS, DRAFT, MASKS = "multi_token_heads.", "draft.", "mask_tokens."


def made(program: Program, text: str, data: list[dict[str, torch.Tensor]] | None = None) -> Program:
    """Run passes unchecked: what is compared here is what they wrote, whatever their contracts would say of it."""
    return graphopt.optimize(program, text, data=data, verify="off")


@SETTINGS
@given(decoders(), st.integers(1, 3), st.integers(1, 2), st.booleans(), SEEDS)
def test_multi_token_heads(drawn: Decoder, heads: int, layers: int, share: bool, seed: int) -> None:
    """Wrong if a head read another value than the model's head, or a residual layer were added in another place."""
    program, model = drawn.program, drawn.model
    options = f"heads={heads} layers={layers} share={str(share).lower()}"
    begun = made(program, f"attach-multi-token-heads{{{options}}}")
    done = shaken(begun, HEADS, seed)
    held = weight_values(done, HEADS)
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        expected, seen = recorded({"hidden": model.last}, lambda given_=given_: model(**given_)["logits"])
        first, found = begun(**given_), done(**given_)
        assert torch.equal(found["logits"], program(**given_)["logits"])
        for head in range(heads):
            assert alike(first["multi_token_logits"][:, :, head], expected), (
                "it begins as the model's own head"
            )
            value = seen["hidden"]
            for layer in range(layers):
                inner = F.linear(value, *(held[f"{head}.{layer}.linear.{p}"] for p in ("weight", "bias")))
                value = value + F.silu(inner)
            said = F.linear(value, model.head if share else held[f"{head}.{layers}.weight"])
            assert alike(found["multi_token_logits"][:, :, head], said)


@SETTINGS
@given(decoders(), st.data())
def test_early_exits(drawn: Decoder, data: st.DataObject) -> None:
    """Wrong if an exit read the stream of another layer, or passed another norm or head than the model's."""
    program, model = drawn.program, drawn.model
    last = drawn.shape.layers - 1
    layers = data.draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=last, unique=True))
    done = made(program, f"attach-early-exit{{layers=[{' '.join(map(str, layers))}]}}")
    blocks = model.blocks
    for size in SIZES:
        given_ = tokens(*size, seed=drawn.seed)
        found = done(**given_)
        assert torch.equal(found["logits"], program(**given_)["logits"])
        for layer in layers:
            model.blocks = blocks[: layer + 1]
            with torch.no_grad():
                expected = model(**given_)["logits"]
            assert alike(found["exit_logits" if len(layers) == 1 else f"exit_logits_{layer}"], expected)


@SETTINGS
@given(decoders(), SEEDS, st.data())
def test_an_attached_draft(drawn: Decoder, seed: int, data: st.DataObject) -> None:
    """Wrong if a depth, the token that follows, a norm or the copied layer were taken from elsewhere."""
    program, model = drawn.program, drawn.model
    number = st.integers(0, drawn.shape.layers - 1)
    layer, taps = data.draw(number), data.draw(st.lists(number, min_size=1, max_size=3))
    text = f"attach-draft{{taps=[{' '.join(map(str, taps))}] layer={layer}}}"
    done = shaken(made(program, text), DRAFT, seed)
    held = weight_values(done, DRAFT)
    own = copy.deepcopy(model.blocks[layer])
    missed = own.load_state_dict(
        {n.removeprefix(f"layer.blocks.{layer}."): v for n, v in held.items() if n.startswith("layer.")}
    )
    assert not missed.missing_keys
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        _, seen = recorded(
            {str(n): block for n, block in enumerate(model.blocks)}, lambda given_=given_: model(**given_)
        )
        features = F.linear(torch.cat([seen[str(t)] for t in taps], -1), held["features.weight"])
        following = F.pad(given_["input_ids"][:, 1:], (0, 1))
        with torch.no_grad():
            embedded = F.embedding(following, model.table)
            normed = [
                F.rms_norm(v, v.shape[-1:], held[f"{n}_norm.weight"], 1e-6)
                for v, n in ((embedded, "embedding"), (features, "features"))
            ]
            hidden = own(F.linear(torch.cat(normed, -1), held["input.weight"]), given_["attention_mask"])
            said = F.linear(model.last(hidden), model.head)
        found = done(**given_)
        assert torch.equal(found["logits"], program(**given_)["logits"])
        assert alike(found["draft_features"], features)
        assert alike(found["draft_hidden"], hidden)
        assert alike(found["draft_logits"], said)


@SETTINGS
@given(
    decoders(), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["all", "attention", "feed-forward"]),
    SEEDS, st.data(),
)  # fmt: skip
def test_mask_tokens(drawn: Decoder, masks: int, rank: int, on: str, seed: int, data: st.DataObject) -> None:
    """Wrong if a LoRA were added where text stands, or a mask token changed what stands before it."""
    program = drawn.program
    begun = made(program, f"attach-mask-tokens{{masks={masks} rank={rank} on={on}}}")
    done = shaken(begun, MASKS, seed)
    for batch, length in SIZES:
        given_ = tokens(batch, length, seed=seed, padded=False)
        expected = program(**given_)["logits"]
        assert torch.equal(done(**given_)["logits"], expected)
        assert alike(begun(**given_)["mask_logits"], expected), "the sampler begins as the model's head"
        text = data.draw(st.integers(1, length - 1))
        marks = torch.zeros(batch, length, dtype=torch.int64)
        marks[:, text:] = 1 + torch.arange(length - text) % masks
        marked = done(**given_, mask_index=marks)["logits"]
        assert torch.equal(marked[:, :text], expected[:, :text])
        assert not torch.allclose(marked[:, text:], expected[:, text:]), "marks make nothing of a token"


@SETTINGS
@given(decoders(), st.integers(0, 3), st.integers(1, 17), SEEDS)
def test_the_largest_entries(drawn: Decoder, heads: int, k: int, seed: int) -> None:
    """Wrong if entries came in another order, of another head, or with the numbers of others."""
    program, output = drawn.program, "logits"
    if heads:
        output = "multi_token_logits"
        program = shaken(made(program, f"attach-multi-token-heads{{heads={heads}}}"), HEADS, seed)
    done = made(program, f"take-top-k{{k={k} output={output}}}")
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        whole, found = program(**given_), done(**given_)
        expected = torch.topk(whole[output], k)
        assert alike(found[f"{output}_values"], expected.values)
        assert torch.equal(found[f"{output}_tokens"], expected.indices)
        assert output not in found
        assert not heads or torch.equal(found["logits"], whole["logits"])


ATTACHED = {
    "": ["logits"],
    "attach-multi-token-heads{heads=2}": ["multi_token_logits"],
    "attach-draft": ["draft_logits"],
    "attach-early-exit{layers=[0]}": ["exit_logits"],
    "attach-draft, attach-multi-token-heads{heads=1 share=true}": ["draft_logits", "multi_token_logits"],
}


@SETTINGS
@given(decoders(), st.sampled_from(sorted(ATTACHED)), st.integers(1, 16), st.integers(0, 3), SEEDS)
def test_a_trimmed_vocabulary(drawn: Decoder, attached: str, keep: int, batches: int, seed: int) -> None:
    """Wrong if rows of other tokens stayed, in another order, or what decides were trimmed too."""
    program = drawn.program
    if attached:
        program = shaken(shaken(made(program, attached), HEADS, seed), DRAFT, seed)
    data = [tokens(2, 9, seed=seed + n) for n in range(batches)]
    done = made(program, f"trim-vocabulary{{keep={keep}}}", data)
    counts = torch.zeros(drawn.shape.vocab, dtype=torch.int64)
    for batch in data:
        for token, seen in zip(batch["input_ids"].flatten(), batch["attention_mask"].flatten(), strict=True):
            counts[token] += seen
    frequent = sorted(range(drawn.shape.vocab), key=lambda token: (-int(counts[token]), token))[:keep]
    kept = torch.tensor(sorted(frequent))
    assert done.facts[Vocabulary].ids == tuple(kept.tolist())
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        whole, found = program(**given_), done(**given_)
        for output, value in whole.items():
            if output in ATTACHED[attached]:
                assert alike(found[output], value.index_select(-1, kept)), output
            else:
                assert torch.equal(found[output], value), output
