"""Encoders, decoders, vision, text and projectors: named by dataflow, taken out, rewritten and put back."""

from __future__ import annotations

from typing import Any

import nested_networks
import pytest
import torch
import zoo
from torch import nn

import graphopt
from graphopt.ir.checking.comparison import relative_error
from graphopt.ir.errors import UsageError, VerificationError
from graphopt.ir.facts import FoldedNorms, Legal

transformers = pytest.importorskip("transformers")

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
           "image_size": 16, "patch_size": 8}  # fmt: skip


def _without_caches(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model.eval()


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 98, shape, generator=torch.Generator().manual_seed(0))


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _encoder_decoder(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    ids = _ids(3, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    return _without_caches(zoo.make(name)), inputs


def _whisper() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return _without_caches(model), {"input_features": _drawn(3, 8, 20), "decoder_input_ids": _ids(3, 5)}


def _clip() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "eos_token_id": 98, "bos_token_id": 0}, vision_config=_VISION, projection_dim=16
    )
    return transformers.CLIPModel(config).eval(), {
        "input_ids": _ids(3, 7),
        "pixel_values": _drawn(2, 3, 16, 16),
    }


def _llava() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.LlavaConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={**_TEXT, "model_type": "llama", "num_key_value_heads": 2}, image_token_id=98,
    )  # fmt: skip
    ids = _ids(2, 9)
    ids[:, 2:6] = 98
    inputs = {"input_ids": ids, "pixel_values": _drawn(2, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    return _without_caches(transformers.LlavaForConditionalGeneration(config)), inputs


MODELS: dict[str, Any] = {
    "t5": lambda: _encoder_decoder("t5"),
    "bart": lambda: _encoder_decoder("bart"),
    "whisper": _whisper,
    "clip": _clip,
    "llava": _llava,
    "transformer": lambda: nested_networks.network("transformer"),
}
# the names of each component, and how many attention blocks it has
COMPONENTS = {
    "t5": {("encoder", "text"): 2, ("decoder", "text"): 4},
    "bart": {("encoder", "text"): 2, ("decoder", "text"): 4},
    "whisper": {("encoder", "audio"): 2, ("decoder", "text"): 4},
    "clip": {("vision",): 3, ("text",): 2},
    "llava": {
        ("vision",): 2,
        ("projector",): 0,
        ("text",): 2,
    },  # it takes the vision tower's last but one state
    "transformer": {("encoder", "features"): 2, ("decoder", "features"): 4},
}


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[graphopt.Program, Any]]:
    return {}


def captured(name: str, programs: dict[str, tuple[graphopt.Program, Any]]) -> tuple[graphopt.Program, Any]:
    if name not in programs:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        dynamic = None if name == "llava" else "auto"
        if name == "transformer":
            program = nested_networks.captured(name)
        else:
            program = graphopt.capture(model, inputs, dynamic=dynamic, compare=False)
        programs[name] = (
            program,
            inputs if isinstance(inputs, dict) else dict(zip(program.input_nodes, inputs, strict=True)),
        )
    return programs[name]


@pytest.mark.parametrize("name", MODELS)
def test_components_are_named(name: str, programs) -> None:
    program, _ = captured(name, programs)
    found = {
        (c.name, *c.other_names): sum(b.kind == "attention" for b in c.blocks)
        for c in program.anatomy.components.values()
    }
    assert found == COMPONENTS[name]


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "transformer"])
def test_cross_attention_reads_the_encoder(name: str, programs) -> None:
    anatomy = captured(name, programs)[0].anatomy
    cross = [b for b in anatomy.component("decoder").blocks if b.sizes.get("cross")]
    assert len(cross) == 2
    assert not any(b.sizes.get("cross") for b in anatomy.component("encoder").blocks)
    assert all("keys from another stream" in b.evidence[0] for b in cross)


def run(program: graphopt.Program, inputs: dict[str, Any]) -> dict[str, Any]:
    return graphopt.ir.running.execute.interpret(program, {n: inputs[n] for n in program.input_nodes})


@pytest.mark.parametrize("name", [n for n in MODELS if n != "clip"])
def test_parts_in_turn_are_the_whole(name: str, programs) -> None:
    program, inputs = captured(name, programs)
    inputs = program.bind((), inputs)
    values: dict[str, Any] = dict(inputs)
    for component in program.anatomy.components:
        values |= run(program.part(component), values)
    for output, expected in run(program, inputs).items():
        if output in values:
            assert relative_error(values[output], expected) < 1e-5
    assert set(program.outputs) & set(values)


@pytest.mark.parametrize("name", MODELS)
def test_each_part_can_be_rewritten_and_put_back(name: str, programs) -> None:
    program, inputs = captured(name, programs)
    inputs = program.bind((), inputs)
    expected = run(program, inputs)
    for component in program.anatomy.components:
        part = graphopt.optimize(program.part(component), "fuse-projections{allow_no_match=true}")
        whole = program.with_part(component, part)
        graphopt.ir.checking.verify.verify(whole)
        fused = any(block.kind == "attention" for block in program.anatomy.component(component).blocks)
        assert (whole.operators != program.operators) == fused
        for output, value in run(whole, inputs).items():
            assert relative_error(value, expected[output]) < 1e-5
        assert set(whole.anatomy.components) == set(program.anatomy.components)


def test_only_the_part_changes(programs) -> None:
    program, inputs = captured("whisper", programs)
    inputs = program.bind((), inputs)
    encoder = program.part("audio")
    shorter = graphopt.optimize(encoder, "skip-layers{layers=[1]}")
    whole = program.with_part("encoder", shorter)
    assert len(whole.anatomy.component("encoder").blocks) == 2
    assert len(whole.anatomy.component("decoder").blocks) == 6
    values = {**inputs, **run(shorter, inputs)}
    expected = {**run(program.part("decoder"), values), "encoder_last_hidden_state": values["encoder"]}
    found = run(whole, inputs)
    assert set(found) == set(expected)
    for output, value in found.items():
        assert relative_error(value, expected[output]) < 1e-5
    names = {w.name for w in whole.weights.values()}
    assert any("encoder.layers.0" in n for n in names)
    assert not any("encoder.layers.1" in n for n in names)


def test_rewritten_weights_keep_their_names_and_facts(programs) -> None:
    program, _ = captured("transformer", programs)
    folded = graphopt.optimize(program.part("encoder"), "fold-norms")
    whole = program.with_part("encoder", folded)
    assert FoldedNorms in whole.facts
    assert FoldedNorms not in program.facts
    names = [name for weight in whole.weights.values() for name in weight.all_names]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.endswith("rewritten")]


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_part_that_was_saved_can_be_put_back(name: str, programs, tmp_path) -> None:
    """It is read with symbols of its own for its sizes, which the whole does not know."""
    program, inputs = captured("whisper", programs)
    inputs = program.bind((), inputs)
    program.part(name).save(tmp_path / "part")
    whole = program.with_part(name, graphopt.load(tmp_path / "part"))
    whole.save(tmp_path / "whole")
    expected = run(program, inputs)
    for output, value in run(graphopt.load(tmp_path / "whole"), inputs).items():
        assert relative_error(value, expected[output]) < 1e-5


def test_a_program_is_legal_only_if_all_of_it_is(programs) -> None:
    program, _ = captured("transformer", programs)
    part = program.part("encoder")
    legal = part.copy()
    legal.facts.add(Legal())
    assert Legal not in program.with_part("encoder", legal).facts
    whole = program.copy()
    whole.facts.add(Legal())
    assert Legal not in whole.with_part("encoder", part).facts
    assert Legal in whole.with_part("encoder", legal).facts


def test_a_part_that_computes_something_else_is_taken_as_it_is(programs) -> None:
    """What a lossy pass changes is the user's: compared is that the part does within the whole what it does alone."""
    program, inputs = captured("whisper", programs)
    encoder = program.part("encoder")
    encoder.replace(encoder.outputs["encoder"], lambda x: 2 * x, encoder.outputs["encoder"].args[0])
    whole = program.with_part("encoder", encoder)
    inputs = program.bind((), inputs)
    assert relative_error(run(whole, inputs)["logits"], run(program, inputs)["logits"]) > 1e-3


def test_what_does_not_fit_is_refused(programs) -> None:
    program, _ = captured("bart", programs)
    with pytest.raises(UsageError, match="no part 'vision'"):
        program.part("vision")
    with pytest.raises(UsageError, match="several parts are 'text': encoder, decoder"):
        program.part("text")
    with pytest.raises(VerificationError, match="takes"):
        program.with_part("encoder", program.part("decoder"))
    single = nested_networks.captured("stages")
    with pytest.raises(UsageError, match="no part 'encoder'"):
        single.part("encoder")
    narrow = program.part("encoder")
    narrow.edit.set_outputs([narrow.outputs["encoder"].args[0]])
    narrow.outputs["encoder"].meta["val"] = program.fake((3, 9, 16), torch.float32)
    with pytest.raises(VerificationError, match="gives encoder as float32"):
        program.with_part("encoder", narrow)


def test_a_weight_that_both_read_is_not_changed_by_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, nested_networks.WIDTH)
            self.encoder = nested_networks.TransformerBlock()
            self.decoder = nested_networks.TransformerBlock(cross=True)

        def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.table(target), self.encoder(self.table(source)))

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 7))
    program = graphopt.capture(Tied().eval(), (ids, ids[:, :4]), compare=False)
    part = program.part("encoder")
    (table,) = (n for n in part.weight_nodes if part.weights[n.name].name == "table.weight")
    whole = program.with_part("encoder", part)
    assert len(whole.weights) == len(program.weights)
    part.weights[table.name] = part.weights[table.name].with_source(
        graphopt.ir.weights.InMemory(torch.zeros(50, 32))
    )
    with pytest.raises(VerificationError, match=r"table.weight has other values in the part"):
        program.with_part("encoder", part)


@pytest.mark.parametrize("name", ["unet", "flux", "dit", "hierarchical", "recommender"])
def test_streams_that_need_one_another_are_no_components(name: str) -> None:
    assert not nested_networks.captured(name).anatomy.components
