"""The models that ship with the project: what their cards state, and that they go everywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from amounts import cases
from paths import ROOT

import graphopt
from graphopt.cli.running import run

HOME = ROOT / "examples" / "reference_models"
sys.path.insert(0, str(HOME))
MODELS = HOME / "models"
LANGUAGE = ("llama", "mixture", "draft")
SETS = ("calibration", "validation", "out_of_domain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Make the text anew, from the packages that are installed here."""
    from corpus import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


def results(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "results.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_text_is_made_again_byte_for_byte(corpus: tuple[Path, dict[str, Any]], name: str) -> None:
    """Wrong if a perplexity is stated for text that nobody else can make."""
    assert corpus[1] == results(name)["corpus"]


def test_no_split_shares_a_paragraph_or_a_file_with_another(corpus: tuple[Path, dict[str, Any]]) -> None:
    owners: dict[str, str] = {}
    for split in ("train", "calibration", "validation"):
        for line in (corpus[0] / f"{split}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert owners.setdefault(entry["source"], split) == split, f"{entry['source']} is in two splits"
            for paragraph in entry["text"].split("\n\n"):
                if len(paragraph) >= 80:
                    key = " ".join(paragraph.split()).lower()
                    assert owners.setdefault(key, split) == split, f"in two splits: {paragraph[:80]!r}"
    assert len(owners) > 20_000


@pytest.mark.parametrize("name", cases(["llama", "draft"], ["mixture"]))
def test_perplexities_are_the_stated_ones(corpus: tuple[Path, dict[str, Any]], name: str) -> None:
    stated = results(name)
    for split in ("out_of_domain",) if name == "draft" else ("validation",):
        found = graphopt.evaluate(
            MODELS / name,
            corpus[0] / f"{split}.jsonl",
            ["perplexity", "accuracy"],
            length=512,
            dtype="float32",
        )
        for metric, value in found.values.items():
            assert value == pytest.approx(stated["sets"][split][metric], rel=1e-3), f"{split}, {metric}"


@pytest.mark.parametrize("name", cases(["llama"], ["mixture", "draft"]))
def test_half_precision_as_stored_costs_nothing_to_speak_of(
    corpus: tuple[Path, dict[str, Any]], name: str
) -> None:
    data = corpus[0] / "validation.jsonl"
    program = graphopt.capture(MODELS / name)
    options: dict[str, Any] = {"metrics": "perplexity", "sequences": 8, "length": 512}
    narrow = graphopt.evaluate(program, data, **options).values["perplexity"]
    wide = graphopt.evaluate(program, data, **options, dtype="float32").values["perplexity"]
    assert narrow == pytest.approx(wide, rel=5e-3)


@pytest.mark.parametrize("name", LANGUAGE)
def test_they_have_learned_something(name: str) -> None:
    stated = results(name)
    better = {s: stated["unigram_perplexity"][s] / stated["sets"][s]["perplexity"] for s in SETS}
    assert better["validation"] > (4 if name == "draft" else 8), better
    assert better["out_of_domain"] > 1, "prose is harder for it than for counting"
    assert stated["sets"]["out_of_domain"]["perplexity"] > 1.5 * stated["sets"]["validation"]["perplexity"]


def test_sizes_and_shapes() -> None:
    from transformers import AutoConfig

    size = sum(p.stat().st_size for n in LANGUAGE for p in (MODELS / n).rglob("*") if p.is_file())
    assert size < 20e6, f"the language models take {size / 1e6:.1f} MB"
    llama, mixture, draft = (AutoConfig.from_pretrained(MODELS / name) for name in LANGUAGE)
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.num_hidden_layers) == (8, 4, 8)
    assert (mixture.num_experts, mixture.num_experts_per_tok) == (8, 2)
    assert 2e6 <= results("llama")["parameters"] <= 4e6
    assert 2e6 <= results("mixture")["parameters"] <= 4e6
    assert results("draft")["parameters"] * 4 < results("llama")["parameters"]
    vocabularies = {(MODELS / n / "tokenizer.json").read_bytes() for n in LANGUAGE}
    assert len(vocabularies) == 1, "the tokenizers differ"
    assert draft.vocab_size == llama.vocab_size == 1024


@pytest.mark.parametrize("name", [*LANGUAGE, "keyword_detector"])
def test_cards_say_what_they_must(name: str) -> None:
    card = (MODELS / name / "README.md").read_text()
    for needed in ("regression tests", "What it is not", "loss.png", "seed", f"{name}.py"):
        assert needed in card
    assert (MODELS / name / "loss.png").read_bytes().startswith(b"\x89PNG")
    if name in LANGUAGE:
        for split in SETS:
            assert f"{results(name)['sets'][split]['perplexity']:.2f}" in card
        assert card.count("```") >= 10, "no samples"


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_and_graphopt_agree(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float16).eval()
    given = tokenizer(["Return the sum of", "Plot"], return_tensors="pt", padding=True)
    given.pop("token_type_ids", None)
    program = graphopt.capture(MODELS / name)
    with torch.no_grad():
        expected = model(**given).logits
    keep = given["attention_mask"].bool()
    assert torch.allclose(program(**given).logits[keep].float(), expected[keep].float(), atol=0.05)


def test_text_comes_back_from_tokens() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODELS / "llama" / "tokenizer.json"))
    for text in ("Return the  sum.\n\n    x : array_like", "naïve — ∑ 東京 \t\r\n", "<|endoftext|"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids) == text
        assert tokenizer.get_vocab_size() == 1024


def test_the_llama_writes_text(corpus: tuple[Path, dict[str, Any]]) -> None:
    """Wrong if what it writes is not made of the words that its text is made of."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "llama")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.float32).eval()
    torch.manual_seed(1)
    given = tokenizer("Return the", return_tensors="pt")["input_ids"].repeat(4, 1)
    made = model.generate(given, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.95, top_k=0)
    known = set((corpus[0] / "train.jsonl").read_text().lower().replace("\\n", " ").split())
    words = [
        w for text in tokenizer.batch_decode(made, skip_special_tokens=True) for w in text.lower().split()
    ]
    assert len(words) > 60
    assert sum(w in known for w in words) / len(words) > 0.8
    assert len(set(words)) > 40, "it repeats itself"


@pytest.mark.parametrize("name", cases(["llama"], ["mixture", "draft"]))
def test_the_whole_way_on_the_command_line(
    corpus: tuple[Path, dict[str, Any]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fused exactly, shortened within what is stated, saved, and out by every exit."""
    data = str(corpus[0] / "validation.jsonl")
    folder, out = str(MODELS / name), str(tmp_path / "fused")
    assert run(["inspect", folder, "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    layers = {"llama": 8, "mixture": 6, "draft": 2}[name]
    assert len(blocks) >= 2 * layers
    amount = ["--sequences", "4", "--length", "128"]
    assert run(["optimize", folder, "-p", "fuse-projections", "-o", out]) == 0
    assert run(["verify", folder, out, "--data", data, *amount, "--json"]) == 0
    capsys.readouterr()
    short = str(tmp_path / "short")
    assert run(["optimize", out, "-p", "skip-layers{remove=1}", "--data", data, *amount, "-o", short]) == 0
    capsys.readouterr()
    compared = ["evaluate", folder, out, short, "--data", data, *amount, "--against", folder, "--json"]
    assert run(compared) == 0
    whole, fused, shorter = (e["values"] for e in json.loads(capsys.readouterr().out))
    assert whole["kl"] == 0
    assert fused["perplexity"] == pytest.approx(whole["perplexity"], rel=2e-3)
    assert shorter["perplexity"] > whole["perplexity"], "a layer less should cost something"
    assert run(["export", short, "--to", "huggingface", "-o", str(tmp_path / "hf")]) == 0
    assert run(["lower", short, "--to", "onnx", "-o", str(tmp_path / "m.onnx")]) == 0
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float16).eval()
    ids = torch.randint(2, 1024, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = graphopt.load(short)(input_ids=ids).logits
        assert torch.allclose(again(input_ids=ids).logits.float(), expected.float(), atol=0.05)


def test_the_detector_is_as_good_as_stated_and_goes_everywhere(tmp_path: Path) -> None:
    from keyword_audio import clips, features
    from keyword_detector import TEST_SEED, judge, load_detector

    parts = [clips(64, TEST_SEED + index) for index in range(8)]
    inputs = torch.cat([features(audio) for audio, _ in parts])
    labels = torch.cat([label for _, label in parts])
    detector = load_detector()
    found = judge(detector, inputs, labels)
    assert found["accuracy"] == pytest.approx(results("keyword_detector")["test"]["accuracy"], abs=0.03)
    program = graphopt.capture(detector, inputs[:4])
    folded = graphopt.optimize(program, "fold-norms")
    assert torch.allclose(folded(inputs[:9]), detector(inputs[:9]), atol=1e-4)
    assert "aten.batch_norm" not in folded.operators or folded.operators["aten.batch_norm"] < 13
    folded.lower("onnx", tmp_path / "detector.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    given = {session.get_inputs()[0].name: inputs[:5].numpy()}
    assert numpy.allclose(session.run(None, given)[0], detector(inputs[:5]).detach().numpy(), atol=1e-3)


def test_the_detector_hears_no_later_frame() -> None:
    """Wrong if a frame's logit depends on frames after it: the network could not be streamed."""
    from keyword_detector import load_detector

    detector = load_detector().double()
    x = torch.randn(2, 40, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[..., 50:] = 7.0
    with torch.no_grad():
        assert torch.equal(detector(x)[:, :50], detector(changed)[:, :50])


def test_audio_depends_on_the_seed_alone() -> None:
    from keyword_audio import FRAMES, HOP, clips, features

    audio, labels = clips(12, 3)
    again, same = clips(12, 3)
    assert torch.equal(audio, again)
    assert torch.equal(labels, same)
    assert not torch.equal(audio, clips(12, 4)[0])
    assert audio.shape == (12, FRAMES * HOP)
    assert audio.abs().max() <= 1
    late = audio.clone()
    late[:, 4000:] = 0
    before = (4000 - 256) // HOP
    assert torch.equal(features(audio)[..., :before], features(late)[..., :before]), "a frame saw the future"


def test_a_run_of_a_script_goes_on(corpus: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The script of a model, shortened: interrupted after some steps, taken up, published, read back."""
    import dataclasses

    import draft
    from language import LanguageModel, train_language_model
    from publish import publish
    from vocabulary import vocabulary

    from graphopt.training import Settings

    small = LanguageModel(
        "draft", "a tiny one", draft.MODEL.build, Settings(steps=3, learning_rate=1e-3, seed=3)
    )
    module, record = train_language_model(small, tmp_path / "run", corpus[0], vocabulary())
    again, seen = train_language_model(small, tmp_path / "run", corpus[0], vocabulary())
    assert seen.losses == record.losses
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    for split in SETS:  # a little text is enough to see that everything is written
        path = tmp_path / "text" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join((corpus[0] / f"{split}.jsonl").read_text().splitlines(True)[:3]))
    for name in ("train.jsonl", "manifest.json"):
        (tmp_path / "text" / name).write_bytes((corpus[0] / name).read_bytes())
    publish(dataclasses.replace(small), module, record, vocabulary(), tmp_path / "out", tmp_path / "text")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "README.md", "config.json", "loss.png", "model.safetensors", "results.json", "tokenizer.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 3
