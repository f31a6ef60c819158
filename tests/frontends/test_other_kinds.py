"""Models of every kind are captured as a folder and as a module, on inputs that are made for them or given."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_kinds
import pytest
import torch
from amounts import THOROUGH
from diffusion_networks import ConditionalUNet, DiffusionTransformer

import graphopt
from graphopt.frontends.architecture import configurations
from graphopt.frontends.example_inputs import Given, example_inputs
from graphopt.ir.running.examples import example_inputs as graph_examples

# one of each way in which inputs are made and sizes are tied
FEW = ("llava", "paligemma", "qwen2_vl", "bart", "whisper", "wav2vec2", "patchtst", "deberta")
NAMES = tuple(other_kinds.KINDS) if THOROUGH else FEW
IN_MEMORY = NAMES if THOROUGH else ("paligemma", "bart", "wav2vec2")
Folder = Callable[[str], tuple[Any, Path, graphopt.Program]]
STACKS = ("t5", "bart", "marian", "whisper", "t5gemma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a model, its folder and the program that it is captured as, made once and only read."""

    @functools.cache
    def made(name: str) -> tuple[Any, Path, graphopt.Program]:
        model, place = other_kinds.make(name), tmp_path_factory.mktemp(name) / "before"
        model.save_pretrained(place)
        return model, place, graphopt.capture(place)

    return made


def tensors_of(outputs: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def require_same(program: Any, model: Any, inputs: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Require equal outputs on other values than those of the capture."""
    generator = torch.Generator().manual_seed(7)
    other = {
        name: value + torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        expected = tensors_of(model(**other, **fixed))
    results = tensors_of(program(**other))
    compared = [name for name in expected if name in results]
    assert compared, "the program gives nothing of what the model gives"
    for name in compared:
        assert torch.allclose(results[name], expected[name], atol=2e-4, rtol=1e-3), f"{name} differs"


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_captured_without_inputs(name: str, folder: Folder) -> None:
    """Wrong if a folder of some kind needed inputs that its configuration already says, or were another function."""
    kind, (model, _, program) = other_kinds.KINDS[name], folder(name)
    assert set(program.signature.inputs) == kind.inputs
    assert program.anatomy.summary() == kind.blocks
    rows = next(iter(program.signature.inputs.values())).shape[0]
    made = example_inputs(model, Given(grow=rows != 1, rows=1 if rows == 1 else 3))
    model.config.use_cache = False
    require_same(program, model, made.inputs, made.fixed)
    if made.fixed:
        assert "captured for" in " ".join(program.origin.notes)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_module_is_captured_and_its_settings_stay(name: str) -> None:
    """Wrong if a module in memory came back with other settings, in any part of it."""
    kind, model = other_kinds.KINDS[name], other_kinds.make(name)
    made = example_inputs(model)
    before = [copy.deepcopy(vars(part)) for part in configurations(model)]
    program = graphopt.capture(model, {**made.inputs, **made.fixed})
    assert [vars(part) for part in configurations(model)] == before
    assert set(program.signature.inputs) == kind.inputs
    assert program.anatomy.summary() == kind.blocks


@pytest.mark.parametrize("name", STACKS if THOROUGH else ("bart", "whisper"))
@pytest.mark.parametrize("layer", [1, 3], ids=["encoder", "decoder"])
def test_two_stacks_go_back_to_a_folder(name: str, layer: int, folder: Folder, tmp_path: Path) -> None:
    """Wrong if a layer were skipped on the other side, or transformers read another model than the program is."""
    import transformers

    model, _, program = folder(name)
    batches = {s for s in program.signature.sizes if s.startswith("batch")}
    assert batches == {"batch"}, "encoder and decoder have one batch"
    shorter = graphopt.optimize(program, f"skip-layers{{layers=[{layer}]}}")
    shorter.save_pretrained(tmp_path / "after")
    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "after").eval()
    again.config.use_cache = False
    stacks = [again.get_encoder(), again.get_decoder()]
    depths = [len(getattr(stack, "layers", None) or stack.block) for stack in stacks]
    assert depths == ([1, 2] if layer == 1 else [2, 1])
    made = example_inputs(model)
    require_same(shorter, again, made.inputs, {})


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"] if THOROUGH else ["qwen2_vl"])
def test_models_that_see_go_back_to_a_folder(name: str, folder: Folder, tmp_path: Path) -> None:
    """Wrong if the folder were compared on texts without images, or with a grid that is not the program's."""
    import transformers

    model, _, program = folder(name)
    ids = graph_examples(program)["input_ids"]
    assert bool((ids == 99).any()), "examples stand for no image"
    shorter = graphopt.optimize(program, "skip-layers{layers=[1]}")
    report = shorter.save_pretrained(tmp_path / "after")
    assert max(report.errors.values()) < 1e-4
    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "after").eval()
    again.config.use_cache = False
    rows = next(iter(program.signature.inputs.values())).shape[0]
    made = example_inputs(again, Given(grow=isinstance(rows, str), rows=3 if isinstance(rows, str) else 1))
    require_same(shorter, again, made.inputs, made.fixed)


@pytest.mark.parametrize("name", ["resnet", "convnext", "mobilenet"])
def test_images_of_another_size_than_the_configuration_says(name: str) -> None:
    """Wrong if a comparison at a size of its own, which nobody asked for, stopped a capture."""
    import transformers as t

    torch.manual_seed(0)
    make = {
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "convnext": lambda: t.ConvNextModel(
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
        "mobilenet": lambda: t.MobileNetV2Model(t.MobileNetV2Config(depth_multiplier=0.25, image_size=96)),
    }
    model = make[name]().eval()
    images = torch.randn(2, 3, 64, 48)
    program = graphopt.capture(model, {"pixel_values": images})
    with torch.no_grad():
        expected = model(images).last_hidden_state
    assert torch.allclose(program(pixel_values=images)["last_hidden_state"], expected, atol=1e-4)
    assert program.signature.takes({"batch": 1})


def test_a_shape_stands_for_an_example(tmp_path: Path) -> None:
    """Wrong if a shape were read as values, or the batch of other inputs did not follow it."""
    other_kinds.make("clip").save_pretrained(tmp_path)
    program = graphopt.capture(tmp_path, {"input_ids": torch.Size([2, 9])}, dynamic=None)
    assert program.signature.inputs["input_ids"].shape == (2, 9)
    assert program.signature.inputs["pixel_values"].shape[0] == 2


def test_what_is_given_is_completed(tmp_path: Path) -> None:
    """Wrong if giving one input of several were refused although the others can be made."""
    other_kinds.make("clip").save_pretrained(tmp_path)
    program = graphopt.capture(tmp_path, {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert set(program.signature.inputs) == other_kinds.KINDS["clip"].inputs


def test_text_alone_is_enough_for_a_model_that_also_sees(tmp_path: Path) -> None:
    """Wrong if images were asked of a text without any."""
    other_kinds.make("llava").save_pretrained(tmp_path)
    program = graphopt.capture(tmp_path, {"input_ids": torch.randint(5, 90, (2, 11))})
    assert set(program.signature.inputs) == {"input_ids", "attention_mask"}


def test_what_processors_give_is_taken(tmp_path: Path) -> None:
    """Wrong if the types of tokens, from which positions follow, were an input of a graph that cannot count by them."""
    model = other_kinds.make("qwen2_vl")
    made = example_inputs(model)
    ids = made.inputs["input_ids"]
    given = {k: v for k, v in made.inputs.items() if k != "position_ids"} | made.fixed
    given["mm_token_type_ids"] = (ids == 99).to(ids.dtype)
    program = graphopt.capture(model, given)
    assert set(program.signature.inputs) == {"input_ids", "attention_mask", "position_ids", "pixel_values"}
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
    results = program(**made.inputs, **made.fixed)["logits"]
    assert torch.allclose(results, expected, atol=2e-4)


def test_a_grid_is_that_of_the_capture() -> None:
    """Wrong if another grid were taken for the one whose loops the graph holds."""
    model = other_kinds.make("qwen2_vl")
    made = example_inputs(model)
    program = graphopt.capture(model, {**made.inputs, **made.fixed}, compare=False)
    with pytest.raises(
        graphopt.UsageError, match=r"image_grid_thw.* was 4 when the model was captured, but is 6"
    ):
        program(**made.inputs, image_grid_thw=torch.tensor([[1, 6, 4]]))


def test_a_frozen_batch_is_one_row(tmp_path: Path) -> None:
    """Wrong if a model with a fixed number of rows were captured for three, which nobody asked for."""
    other_kinds.make("timesfm").save_pretrained(tmp_path)
    program = graphopt.capture(tmp_path)
    assert program.signature.inputs["past_values"].shape[0] == 1


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown name": (
        "clip",
        {"pixels": torch.randn(2, 3, 16, 16)},
        "takes no input 'pixels'.*pixel_values",
    ),
    "no tensor": ("clip", {"pixel_values": [1, 2]}, "pixel_values must be a tensor, but a list was given"),
    "whole numbers for images": (
        "clip",
        {"pixel_values": torch.zeros(2, 3, 16, 16, dtype=torch.long)},
        "pixel_values must hold floating-point numbers, but its type is int64.*float32",
    ),
    "fractions for tokens": ("clip", {"input_ids": torch.rand(2, 9)}, "input_ids must hold integers.*int64"),
    "too few dimensions": (
        "clip",
        {"pixel_values": torch.randn(3, 16, 16)},
        r"pixel_values has 3 dimensions, but CLIPModel takes 4.*\[3, 3, 16, 16\]",
    ),
    "a size that cannot vary": (
        "clip",
        {"pixel_values": torch.randn(2, 3, 24, 24)},
        r"CLIPModel does not take pixel_values as given.*doesn't match model.*pixel_values such as \[2, 3, 16, 16\]",
    ),
    "nothing inside": ("clip", {"pixel_values": torch.zeros(0, 3, 16, 16)}, "pixel_values is empty"),
    "a grid as a shape": (
        "qwen2_vl",
        {"image_grid_thw": torch.Size([1, 3])},
        "values of image_grid_thw decide sizes",
    ),
    "too few frames": (
        "whisper",
        {"input_features": torch.randn(2, 16, 30)},
        r"input_features.*length.*input_features such as \[2, 16, 40\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", ["folder", "module"])
def test_inputs_that_do_not_fit_are_refused_by_name(case: str, way: str, tmp_path: Path) -> None:
    """Wrong if a wrong input were found by an error of the library, or not at all."""
    name, inputs, message = BAD[case]
    model: Any = other_kinds.make(name)
    if way == "folder":
        model.save_pretrained(tmp_path)
        model = tmp_path
    with pytest.raises(graphopt.UsageError) as caught:
        graphopt.capture(model, inputs)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_a_processor_with_code_of_its_own(tmp_path: Path) -> None:
    """Wrong if its sizes were used without its code, or its code were run; given inputs need no processor."""
    other_kinds.make("clip").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "own.Own"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(graphopt.UsageError, match=r"asks for code.*pixel_values cannot be made"):
        graphopt.capture(tmp_path)
    program = graphopt.capture(tmp_path, {"pixel_values": torch.randn(2, 3, 16, 16)}, compare=False)
    assert set(program.signature.inputs) == other_kinds.KINDS["clip"].inputs


def test_an_input_that_nothing_describes(tmp_path: Path) -> None:
    """Wrong if a model with inputs of its own were captured on something made up."""
    import transformers as t

    config = t.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1
    )
    t.PerceiverModel(config).save_pretrained(tmp_path)
    with pytest.raises(graphopt.UsageError, match="takes inputs, for which there is no example"):
        graphopt.capture(tmp_path)


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_networks_of_diffusion(name: str) -> None:
    """Wrong if a time, a text and a latent had batches of their own, or another size were another function."""
    torch.manual_seed(0)
    model, inputs = {
        "transformer": (
            DiffusionTransformer(),
            {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timesteps": torch.tensor([3, 70]),
                "class_labels": torch.tensor([1, 2]),
            },
        ),
        "unet": (
            ConditionalUNet(),
            {
                "sample": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor([3, 70]),
                "encoder_hidden_states": torch.randn(2, 5, 24),
            },
        ),
    }[name]
    program = graphopt.capture(model.eval(), inputs)
    assert {spec.shape[0] for spec in program.signature.inputs.values()} == {"batch"}
    assert program.anatomy.summary()["attention"] == {"transformer": 2, "unet": 3}[name]
    larger = {
        k: torch.cat([v, v[:1]]) if v.dim() < 4 else torch.randn(3, 4, 12, 8) for k, v in inputs.items()
    }
    with torch.no_grad():
        expected = model(**larger)
    assert torch.allclose(program(**larger), expected, atol=1e-4)


@pytest.mark.skipif(not THOROUGH, reason="takes half a minute")
def test_a_model_of_usual_size(tmp_path: Path) -> None:
    """Wrong if a model above a hundred million parameters were slow to capture, or compared with another."""
    import transformers as t

    few = {"num_hidden_layers": 8}
    model = t.CLIPModel(t.CLIPConfig(text_config=few, vision_config=few)).eval()
    assert sum(p.numel() for p in model.parameters()) > 100_000_000
    model.save_pretrained(tmp_path)
    del model
    program = graphopt.capture(tmp_path)
    assert program.anatomy.summary() == {"attention": 16, "ffn": 16}
    assert program.signature.inputs["pixel_values"].shape[2:] == (224, 224)
