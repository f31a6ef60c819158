"""One maker for each kind of input: it yields the forms that the input may have, the likeliest first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .example_inputs import Making

BATCH, LENGTH, DECODER_LENGTH = 3, 13, 7

Maker = Callable[["Making", Mapping[str, Any]], Iterator[torch.Tensor | None]]
MAKERS: dict[str, Maker] = {}


def _maker(*names: str) -> Callable[[Maker], Maker]:
    def register(function: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, function))
        return function

    return register


def _patches(making: Making) -> tuple[int, int, int]:
    """Return the merge of patches, their number of values, and their number of values over time."""
    merge = int(making.setting("spatial_merge_size", inside="vision", otherwise=2))
    patch = int(making.setting("patch_size", inside="vision", otherwise=14))
    time = int(making.setting("temporal_patch_size", inside="vision", otherwise=1))
    return merge, making.channels() * time * patch * patch, time


@_maker("image_grid_thw", "grid_thw")
def _grid(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    merge = _patches(making)[0]
    yield torch.tensor([[1, 2 * merge, 3 * merge]] * making.batch)


@_maker("spatial_shapes")
def _shapes(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    patches = int(making.setting("num_patches", inside="vision", otherwise=16))
    height = math.isqrt(patches)
    yield torch.tensor([[height, patches // height]] * making.batch)


@_maker("aspect_ratio_ids")
def _aspect_ratios(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    # 0 is that of no image
    yield torch.ones(making.batch, 1, dtype=torch.long)


@_maker("aspect_ratio_mask")
def _tile_mask(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    tiles = int(making.setting("max_num_tiles", inside="vision", otherwise=1))
    yield torch.ones(making.batch, 1, tiles, dtype=torch.long)


@_maker("pixel_attention_mask")
def _patch_mask(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    if "spatial_shapes" in made:
        yield torch.ones(making.batch, int(made["spatial_shapes"].prod(-1).max()), dtype=torch.long)
        return
    pixels = made.get("pixel_values")
    if pixels is None:
        yield torch.ones(making.batch, *making.image_size(), dtype=torch.long)
    else:
        # a mask for each image, without the channels
        yield torch.ones(*pixels.shape[:-3], *pixels.shape[-2:], dtype=torch.long)


@_maker("pixel_mask")
def _pixel_mask(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    size = made["pixel_values"].shape[-2:] if "pixel_values" in made else making.image_size()
    yield torch.ones(making.batch, *size, dtype=torch.long)


@_maker("image_sizes")
def _image_sizes(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor | None]:
    # only models that cut images up need them
    yield None
    size = made["pixel_values"].shape[-2:] if "pixel_values" in made else making.image_size()
    yield torch.tensor([list(size)] * making.batch)


@_maker("pixel_values", "hidden_states")
def _pixels(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    batch, channels, (height, width) = making.batch, making.channels(), making.image_size()
    grid = made.get("image_grid_thw", made.get("grid_thw"))
    if grid is not None:
        yield making.noise(int(grid.prod(-1).sum()), _patches(making)[1])
        return
    if "spatial_shapes" in made:
        shapes = made["spatial_shapes"]
        yield making.noise(batch, int(shapes.prod(-1).max()), _patches(making)[1])
        return
    if "aspect_ratio_mask" in made:
        # tiles of one image
        yield making.noise(batch, *made["aspect_ratio_mask"].shape[1:], channels, height, width)
        return
    frames = getattr(making.config, "num_frames", None)
    image = making.noise(batch, channels, height, width)
    if isinstance(frames, int) and making.main == "pixel_values":
        yield making.noise(batch, frames, channels, height, width)
    yield image
    # one image a row, in a dimension of its own, or whole with its crops
    yield image.unsqueeze(1)
    yield making.noise(batch, 2, channels, height, width)
    # patches, already cut out and flattened
    patch = making.setting("patch_size", inside="vision")
    if isinstance(patch, int):
        yield making.noise(batch, (height // patch) * (width // patch), channels * patch * patch)


@_maker("pixel_values_videos")
def _video(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    size = making.setting("crop_size")
    height, width = (size, size) if isinstance(size, int) else making.image_size()
    frames = int(making.setting("num_frames", "frames_per_clip", otherwise=8))
    yield making.noise(making.batch, frames, making.channels(), height, width)


@_maker("input_features")
def _features(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    batch = making.batch
    bins = making.setting(
        "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_feature_size", "num_mels",
        inside="audio", otherwise=making.processor.get("feature_size", 80),
    )  # fmt: skip
    places = making.setting("max_source_positions", inside="audio")
    longest = making.processor.get("nb_max_frames")
    if isinstance(places, int):
        yield making.noise(batch, bins, 2 * places)
    if isinstance(longest, int):
        yield making.noise(batch, bins, longest)
    yield making.noise(batch, 101, bins)
    yield making.noise(batch, bins, 104)
    length, height = making.setting("max_length", otherwise=104), making.setting("spec_size", otherwise=64)
    yield making.noise(batch, 1, int(length), int(bins))
    yield making.noise(batch, 1, 16 * int(height) // 4, int(bins))


@_maker("input_values")
def _samples(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    batch, bins, length = making.batch, making.setting("num_mel_bins"), making.setting("max_length")
    if isinstance(bins, int) and isinstance(length, int) and making.setting("patch_size"):
        yield making.noise(batch, length, bins)
    strides = making.setting("conv_stride", "upsampling_ratios", "downsampling_ratios", otherwise=(320,))
    hop = math.prod(int(s) for s in strides) if isinstance(strides, (list, tuple)) else 320
    # a receptive field is at most a few strides
    samples = hop * 16 + (hop * 5) // 4
    yield making.noise(batch, samples)
    yield making.noise(batch, 1, hop * 16)
    yield making.noise(batch, int(making.setting("audio_channels", otherwise=2)), hop * 16)
    if isinstance(bins, int):
        yield making.noise(batch, 32, bins)


def _history(making: Making) -> int:
    context = int(making.setting("context_length", otherwise=32))
    lags = making.setting("lags_sequence")
    return context + (max(lags) if isinstance(lags, (list, tuple)) and lags else 0)


@_maker("past_values")
def _past(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    batch, context = making.batch, _history(making)
    channels = making.setting("num_input_channels", "input_size")
    if (isinstance(channels, int) and channels > 1) or making.setting("num_input_channels"):
        yield making.noise(batch, context, int(channels))
    yield making.noise(batch, context)
    yield making.noise(batch, context, 1)


@_maker("past_observed_mask")
def _observed(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.ones(made["past_values"].shape)


@_maker("past_values_padding")
def _series_padding(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.zeros(made["past_values"].shape, dtype=torch.long)


@_maker("past_time_features")
def _past_times(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    features = int(making.setting("num_time_features", otherwise=0))
    yield making.noise(making.batch, _history(making), features)


@_maker("future_values")
def _future(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    length = int(making.setting("prediction_length", otherwise=8))
    yield making.noise(making.batch, length, *made["past_values"].shape[2:])


@_maker("future_time_features")
def _future_times(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    length = int(making.setting("prediction_length", otherwise=8))
    yield making.noise(making.batch, length, int(making.setting("num_time_features", otherwise=0)))


@_maker("static_categorical_features")
def _categories(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.zeros(making.batch, int(making.setting("num_static_categorical_features")), dtype=torch.long)


@_maker("static_real_features")
def _reals(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield making.noise(making.batch, int(making.setting("num_static_real_features")))


@_maker("freq")
def _frequencies(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.zeros(making.batch, 1, dtype=torch.long)
    yield torch.zeros(making.batch, dtype=torch.long)


def _codebooks(making: Making) -> int:
    """Return how many rows of codes there are for each row of audio, where a model takes codes in place of text."""
    found = making.setting("num_codebooks")
    return found if isinstance(found, int) else 1


@_maker("input_ids")
def _tokens(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    mask = made.get("attention_mask")
    length = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else LENGTH
    rows = making.batch
    ids = making.ids((rows, length))
    first = [torch.full((rows, count), token, dtype=ids.dtype) for token, count in making.placeholders(made)]
    ids = torch.cat([*first, ids], 1)
    end = getattr(making.text, "eos_token_id", None)
    if isinstance(end, int) and hasattr(making.config, "projection_dim"):
        # contrastive models read the end of the text
        ids[:, -1] = end
    yield ids
    if _codebooks(making) > 1 and not first:
        yield making.ids((rows * _codebooks(making), length))


@_maker("qformer_input_ids")
def _queries(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield making.ids((making.batch, LENGTH), getattr(making.config, "qformer_config", None))


@_maker("qformer_attention_mask")
def _query_mask(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.ones_like(made["qformer_input_ids"])


@_maker("decoder_input_ids")
def _decoder_tokens(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    decoder = getattr(making.config, "decoder", None)
    yield making.ids((making.batch, DECODER_LENGTH), decoder if hasattr(decoder, "vocab_size") else None)


@_maker("attention_mask")
def _mask(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    ids = made["input_ids"]
    codebooks = _codebooks(making)
    if codebooks > 1 and "input_ids" not in making.given and ids.shape[0] == codebooks * making.batch:
        ids = ids[::codebooks]
    yield torch.ones_like(ids)


@_maker("token_type_ids", "mm_token_type_ids")
def _types(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    ids, image = made["input_ids"], making.token("image")
    yield torch.zeros_like(ids) if image is None else (ids == image).to(ids.dtype)


@_maker("position_ids")
def _positions(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    ids = made["input_ids"]
    index = making.rope_index()
    if index is not None and "image_grid_thw" in made:
        accepted = inspect.signature(index).parameters
        known = {"mm_token_type_ids": next(_types(making, made)), **made}
        positions = index(**{n: v for n, v in known.items() if n in accepted})
        yield positions[0] if isinstance(positions, tuple) else positions
        return
    yield torch.arange(ids.shape[1]).expand(ids.shape).clone()


@_maker("bbox")
def _boxes_of_words(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    corners = torch.randint(0, 400, (*made["input_ids"].shape, 2), generator=making.random)
    yield torch.cat([corners, corners + 50], -1)


@_maker("input_boxes")
def _boxes(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    size = min(making.image_size())
    corner = torch.rand(making.batch, 2, 2, generator=making.random) * size / 2
    yield torch.cat([corner, corner + size / 4], -1)


@_maker("input_points")
def _points(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    yield torch.rand(making.batch, 2, 3, 2, generator=making.random) * min(making.image_size())


@_maker("input_labels")
def _labels(making: Making, made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    shape = made["input_points"].shape[:-1] if "input_points" in made else (making.batch, 2, 3)
    yield torch.ones(shape, dtype=torch.long)
