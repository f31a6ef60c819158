"""Inputs made from a configuration: images as patches, rows of codes, and parts of a model that are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_kinds import _TEXT, _VISION

from graphopt.frontends.accepting import refusal
from graphopt.frontends.example_inputs import example_inputs
from graphopt.ir.errors import UsageError


def made(name: str, config: Any) -> dict[str, list[int]]:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.config.use_cache = False
    example = example_inputs(model)
    with torch.no_grad():
        model(**example.inputs, **example.fixed)
    return {input_name: list(value.shape) for input_name, value in example.inputs.items()}


def test_images_that_are_cut_into_patches_outside_the_model() -> None:
    """Wrong if pixels were only made as images, or the class with the head had to count the patches itself."""
    from transformers import FuyuConfig

    text = {**_TEXT, "model_type": "persimmon"}
    config = FuyuConfig(text_config=text, image_size=16, patch_size=8, image_token_id=100)
    shapes = made("FuyuForCausalLM", config)
    assert shapes["pixel_values"] == [3, 4, 192]
    assert shapes["input_ids"] == [3, 4 + 13]


def test_masks_of_pixels_have_a_row_for_each_image() -> None:
    """Wrong if images in a dimension of their own had a mask for each row of the batch alone."""
    from transformers import Idefics3Config

    config = Idefics3Config(
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_VISION, "image_size": 16, "patch_size": 4},
        image_token_id=100,
        scale_factor=2,
        pad_token_id=0,
    )
    shapes = made("Idefics3ForConditionalGeneration", config)
    assert shapes["pixel_values"] == [3, 1, 3, 16, 16]
    assert shapes["pixel_attention_mask"] == [3, 1, 16, 16]


def test_images_in_tiles() -> None:
    """Wrong if images had no tiles, or no form of their own was said of them."""
    from transformers import MllamaConfig

    config = MllamaConfig(
        text_config={**_TEXT, "num_key_value_heads": 4, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "attention_heads": 4, "num_hidden_layers": 2,
            "num_global_layers": 1, "image_size": 16, "patch_size": 8, "max_num_tiles": 2, "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [1],
        },
        image_token_index=100,
    )  # fmt: skip
    shapes = made("MllamaForConditionalGeneration", config)
    assert shapes["pixel_values"] == [3, 1, 2, 3, 16, 16]
    assert shapes["aspect_ratio_ids"] == [3, 1]
    assert shapes["aspect_ratio_mask"] == [3, 1, 2]


def test_codes_have_several_rows_for_each_of_the_mask() -> None:
    from transformers import MusicgenDecoderConfig

    config = MusicgenDecoderConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, num_codebooks=4,
        pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    assert made("MusicgenForCausalLM", config) == {"input_ids": [12, 13], "attention_mask": [3, 13]}


def test_a_part_that_the_configuration_leaves_out_sees_nothing() -> None:
    """Wrong if a configuration that names a part without having it asked for that part's inputs."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedTextConfig

    text = Gemma4UnifiedTextConfig(**{**_TEXT, "num_key_value_heads": 2, "head_dim": 8}).to_dict()
    config = Gemma4UnifiedConfig(text_config=text, vision_config=None, audio_config=None)
    assert set(made("Gemma4UnifiedForConditionalGeneration", config)) == {"input_ids", "attention_mask"}


def test_an_input_left_out_is_a_refusal_and_no_fault() -> None:
    """Wrong if a model that reads an attribute of an input that it was not given ended in another error than ours."""
    from transformers import PretrainedConfig

    class Silent(torch.nn.Module):
        main_input_name = "input_ids"
        config = PretrainedConfig(vocab_size=101, num_codebooks=2)

        def forward(self, input_ids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
            return input_ids * weights.sum()  # type: ignore[union-attr]

    with pytest.raises(UsageError, match="no attribute 'sum'"):
        example_inputs(Silent())


def test_asking_leaves_nothing_in_a_model() -> None:
    """Wrong if tables that a model keeps were of the run that asked whether it takes inputs, without values."""
    from transformers import PretrainedConfig

    class Keeping(torch.nn.Module):
        main_input_name = "input_ids"
        config = PretrainedConfig(vocab_size=101, num_codebooks=2)

        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(1))
            self.tables: dict[str, torch.Tensor] = {}

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if "bias" not in self.tables:
                self.tables["bias"] = self.bias * 2
            return input_ids + self.tables["bias"]

    model = Keeping()
    assert refusal(model, {"input_ids": torch.zeros(2, 3, dtype=torch.long)}) is None
    assert not model.tables
