"""Inputs on which a checkpoint is captured: what the user gave, completed by what its configuration says.

What a model takes is known by the names of its inputs, which the library uses with one meaning throughout. Where a
configuration leaves several forms open (audio as samples or as frames), the first one that the model accepts is taken,
which is found by running it without memory.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch

from ..ir.errors import UsageError
from .accepting import REFUSALS, first_line, refusal
from .architecture import nested
from .fixed_values import FIXED, fixed_inputs
from .input_makers import BATCH, LENGTH, MAKERS

_CANDIDATES = 24
GIVE = "give inputs=, an example of what the model takes"

# sizes of inputs by name, as far as they can vary; a number of dimensions that is not here varies in its batch alone
_SIZES: dict[str, dict[int, tuple[str | None, ...]]] = {
    "input_ids": {2: ("batch", "sequence")},
    "attention_mask": {2: ("batch", "sequence")},
    "token_type_ids": {2: ("batch", "sequence")},
    "mm_token_type_ids": {2: ("batch", "sequence")},
    "position_ids": {2: ("batch", "sequence"), 3: (None, "batch", "sequence")},
    "inputs_embeds": {3: ("batch", "sequence", None)},
    "bbox": {3: ("batch", "sequence", None)},
    "decoder_input_ids": {2: ("batch", "decoder_sequence")},
    "decoder_attention_mask": {2: ("batch", "decoder_sequence")},
    "input_values": {2: ("batch", "samples"), 3: ("batch", None, None)},
    "input_features": {3: ("batch", "frames", None)},
    "aspect_ratio_ids": {2: ("batch", None)},
    "input_boxes": {3: ("batch", "boxes", None)},
    "input_points": {4: ("batch", "prompts", "points", None)},
    "input_labels": {3: ("batch", "prompts", "points")},
}
_MASKS = ("attention_mask", "decoder_attention_mask", "pixel_attention_mask", "pixel_mask", "feature_attention_mask",
          "input_features_mask", "past_observed_mask", "padding_mask")  # fmt: skip
_WHOLE = ("input_ids", "decoder_input_ids", "token_type_ids", "mm_token_type_ids", "position_ids", "bbox",
          "input_labels", "qformer_input_ids", "qformer_attention_mask", "freq", "static_categorical_features",
          *FIXED, *_MASKS)  # fmt: skip
# what processors make
_PROCESSED = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
# what a model fills in by itself, or works without
_OPTIONAL = ("attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Example:
    """An example of a model's inputs.

    Attributes:
        inputs: what the program takes, by name.
        fixed: tensors whose values decide sizes; they are part of the program.
        sizes: names of the sizes that vary, by input and dimension.
        marked: how many tokens stand for images, if their number is fixed.
    """

    inputs: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[int, str]] = field(default_factory=dict)
    marked: int = 0


@dataclass(frozen=True)
class Given:
    """What an example starts from.

    Attributes:
        inputs: of the user, by name: tensors, or a ``torch.Size`` for a tensor of that size to be made.
        processor: the settings of the checkpoint's processor, as plain data.
        grow: repeat a batch of one and short texts, whose sizes would not vary otherwise.
        complete: add inputs that may be left out, such as masks.
        rows: of an example of which nothing was given.
    """

    inputs: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    grow: bool = True
    complete: bool = True
    rows: int = BATCH


def causal(config: Any) -> bool:
    """Return whether a configuration is that of a decoder that predicts the next token."""
    names = " ".join(getattr(config, "architectures", None) or [])
    return "CausalLM" in names or "LMHead" in names or bool(getattr(config, "is_decoder", False))


def example_inputs(model: Any, given: Given | None = None) -> Example:
    """Return an example for a transformers model.

    Args:
        model: with or without values.
        given: by the user; what is left out is made.

    Raises:
        UsageError: an input cannot be made, or the given ones do not fit the model.
    """
    given = given or Given()
    making = Making(model, given)
    if making.given and not making.asked:
        # what was given is enough for most models; a mask and positions are added where they stay optional
        example = making.with_optional(making.given)
        trouble = refusal(model, {**example.inputs, **example.fixed})
        if trouble is None:
            return example
        if not making.missing():
            making.require_shapes()
            raise UsageError(
                f"{type(model).__name__} does not take these inputs: {trouble}",
                hint=f"it takes {making.described()}",
            )
    return making.completed()


def with_few_rows(given: Given, shapes: Mapping[str, tuple[int | str, ...]]) -> Given | None:
    """Return a start with one row, if a model froze the number of rows, and that number was none of the user's.

    Args:
        given: what the capture began with.
        shapes: of the captured program's inputs.
    """
    if not given.grow:
        return None

    def rows(name: str, shape: Sequence[int | str]) -> int | str | None:
        names = _SIZES.get(name, {}).get(len(shape), ("batch",))
        return shape[names.index("batch")] if shape and "batch" in names and name not in FIXED else None

    theirs = {
        rows(name, tuple(value.shape)) for name, value in given.inputs.items() if hasattr(value, "shape")
    }
    frozen = any(rows(name, shape) == BATCH for name, shape in shapes.items())
    return replace(given, grow=False, rows=1) if frozen and theirs <= {1, None} else None


def require_kinds(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's inputs after checking names and kinds.

    Raises:
        UsageError: the model takes no input of a name, or a value is none that an input can have.
    """
    parameters = inspect.signature(model.forward).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    checked = {}
    for name, value in given.items():
        if isinstance(value, numpy.ndarray):
            value = torch.from_numpy(value)
        tensor = isinstance(value, (torch.Tensor, torch.Size))
        if name not in named and (tensor or not free):
            raise UsageError(
                f"{type(model).__name__} takes no input {name!r}",
                hint=f"it takes {', '.join(n for n in named if n in MAKERS or n in _SIZES) or ', '.join(named)}",
            )
        if name in (*_WHOLE, "pixel_values", "input_features", "input_values", "past_values") and not (
            tensor or value is None
        ):
            raise UsageError(
                f"{name} must be a tensor, but a {type(value).__name__} was given",
                hint="give each input by name, as a tensor",
            )
        if isinstance(value, torch.Tensor):
            whole = not (value.is_floating_point() or value.is_complex())
            if name in _WHOLE and not whole and name not in _MASKS:
                raise UsageError(
                    f"{name} must hold integers, but its type is {_named(value.dtype)}",
                    hint=f"give {name} as int64",
                )
            if name.startswith(("pixel_values", "input_features", "input_values", "past_values")) and whole:
                raise UsageError(
                    f"{name} must hold floating-point numbers, but its type is {_named(value.dtype)}",
                    hint=f"give {name} as float32, as the model's processor makes it",
                )
            if not value.numel():
                raise UsageError(
                    f"{name} is empty: its shape is {list(value.shape)}", hint=f"give {GIVE[5:]}"
                )
        if isinstance(value, torch.Size) and name in FIXED:
            raise UsageError(
                f"the values of {name} decide sizes, so a shape says too little",
                hint=f"give inputs=, with {name} as a tensor",
            )
        checked[name] = value
    return checked


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Unmade(Exception):
    """An input that cannot be made from the configuration."""

    def __init__(self, name: str, reason: str = ""):
        super().__init__(name)
        self.name, self.reason = name, reason


class Making:
    """Makes the inputs of one model."""

    def __init__(self, model: Any, start: Given):
        self.model, self.config, self.processor, self.start = model, model.config, start.processor, start
        self.main = str(getattr(model, "main_input_name", "input_ids"))
        parameters = inspect.signature(model.forward).parameters
        self.takes = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        checked = {k: v for k, v in require_kinds(model, start.inputs).items() if v is not None}
        self.asked = {name: value for name, value in checked.items() if isinstance(value, torch.Size)}
        given = {name: value for name, value in checked.items() if name not in self.asked}
        self.given = self.grown(given)
        self.random = torch.Generator().manual_seed(0)
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        self.text = text
        # what is fixed says how many images there are: as few as possible, unless they were given
        self.batch = self._batch(1 if self._is_fixed() else start.rows)

    def _is_fixed(self) -> bool:
        crops = ("image_sizes",) if hasattr(self.config, "image_grid_pinpoints") else ()
        fixed = ("image_grid_thw", "grid_thw", "spatial_shapes", *crops)
        return "input_features" not in self.takes and any(name in self.takes for name in fixed)

    def _batch(self, otherwise: int) -> int:
        for name, value in {**self.given, **self.asked}.items():
            shape = value if isinstance(value, torch.Size) else getattr(value, "shape", ())
            names = _SIZES.get(name, {}).get(len(shape), ("batch",))
            if name not in FIXED and "batch" in names and len(shape):
                return int(shape[names.index("batch")])
        return otherwise

    # -- which inputs -------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of the inputs that this model is given, those first that others depend on."""
        config, takes, main = self.config, self.takes, self.main
        parts = nested(config)
        required = [n for n, p in takes.items() if p.default is inspect.Parameter.empty]
        vocabulary = getattr(self.text, "vocab_size", None)
        sees = any(
            getattr(part, "patch_size", None) or getattr(part, "image_size", None)
            for part in parts
            if not getattr(part, "vocab_size", None) or part is config
        ) or any(getattr(config, n, None) is not None for n in ("vision_config", "backbone_config"))
        hears = any(getattr(config, n, None) is not None for n in ("audio_config", "speech_config"))
        wanted: dict[str, None] = dict.fromkeys(required)
        wanted[main] = None
        if "pixel_values" in takes and sees:
            wanted["pixel_values"] = None
        if "input_features" in takes and hears:
            wanted["input_features"] = None
        if "pixel_values" in wanted:
            for name in (
                "image_grid_thw", "spatial_shapes", "pixel_attention_mask", "image_sizes", "aspect_ratio_ids",
                "aspect_ratio_mask",
            ):  # fmt: skip
                if name in takes:
                    wanted[name] = None
        read = vocabulary and main in ("pixel_values", "input_features") and "decoder_input_ids" not in takes
        if "input_ids" in takes and read:
            wanted["input_ids"] = None
        if "bbox" in takes and "input_ids" in wanted:
            wanted["bbox"] = None
        if (
            "token_type_ids" in takes
            and "input_ids" in wanted
            and (getattr(self.text, "type_vocab_size", None) or self.token("image") is not None)
        ):
            wanted["token_type_ids"] = None
        if "attention_mask" in takes and "input_ids" in wanted:
            wanted["attention_mask"] = None
        if (
            "position_ids" in takes
            and "input_ids" in wanted
            and (causal(config) or self.rope_index() is not None)
        ):
            wanted["position_ids"] = None
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            wanted["decoder_input_ids"] = None
        for name in ("freq", "past_values_padding", "past_time_features", "past_observed_mask"):
            if name in takes and main == "past_values":
                wanted[name] = None
        for name in ("static_categorical_features", "static_real_features"):
            if name in takes and getattr(config, f"num_{name}", None):
                wanted[name] = None
        if "future_time_features" in takes and not main.startswith("future"):
            wanted["future_values"] = wanted["future_time_features"] = None
        if "input_points" in takes:
            wanted["input_points"] = None
        if "qformer_input_ids" in wanted:
            wanted["qformer_attention_mask"] = None
        names = [n for n in wanted if n in takes and n not in ("inputs_embeds",)]
        return sorted(
            names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n not in required)
        )

    def missing(self) -> list[str]:
        """Return the inputs that were not given, without those that a model fills in by itself."""
        return [n for n in self.names() if n not in self.given and n not in _OPTIONAL]

    def described(self) -> str:
        """Return the names and forms of the inputs, as far as they are known."""
        # shapes that were asked for are not what the model takes
        usual = Making(self.model, replace(self.start, inputs={})) if self.asked else self
        try:
            made = next(usual._made(self.names(), {}), {})
        except _Unmade:
            made = {}
        parts = [
            f"{n} such as {list(made[n].shape)} of {_named(made[n].dtype)}" if n in made else n
            for n in self.names()
        ]
        return ", ".join(parts)

    def require_shapes(self) -> None:
        """Refuse given inputs with another number of dimensions than the model's."""
        for name, value in self.given.items():
            if not isinstance(value, torch.Tensor) or name not in MAKERS:
                continue
            with_others = {n: v for n, v in self.given.items() if n != name}
            try:
                usual = next(iter(MAKERS[name](self, with_others)), None)
            except _Unmade:
                continue
            if usual is not None and usual.dim() != value.dim():
                raise UsageError(
                    f"{name} has {value.dim()} dimensions, but {type(self.model).__name__} takes {usual.dim()}",
                    hint=f"give {name} in a shape such as {list(usual.shape)}",
                )

    # -- making them --------------------------------------------------------------------------------------

    def completed(self) -> Example:
        """Return the first example that the model accepts; what was given stays."""
        names = [n for n in self.names() if n not in self.given]
        names += [n for n in self.asked if n not in names]
        names.sort(key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))
        trouble = ""
        if "auto_map" in self.processor and _PROCESSED & set(names):
            raise UsageError(
                "the checkpoint's processor asks for code from the checkpoint (auto_map), which is never run, so that "
                f"{', '.join(sorted(_PROCESSED & set(names)))} cannot be made",
                hint=GIVE,
            )
        try:
            candidates = list(itertools.islice(self._made(names, dict(self.given)), _CANDIDATES))
        except _Unmade as unmade:
            raise UsageError(
                f"{type(self.model).__name__} takes {unmade.name}, for which there is no example"
                + (f": {unmade.reason}" if unmade.reason else ""),
                hint=GIVE,
            ) from None
        except REFUSALS as error:
            if not (self.given or self.asked):
                raise
            # what is made to fit what is given does not fit its rank
            raise self.unfit(f"{type(error).__name__}: {first_line(error)}") from None
        for made in candidates:
            example = self.example(made)
            if len(candidates) == 1 and not self.given and not self.asked:
                return example
            refused = refusal(self.model, {**example.inputs, **example.fixed})
            if refused is None:
                return example
            # the first candidate is the likeliest, and what is told of it the reason
            trouble = trouble or refused
        if self.given or self.asked:
            self.require_shapes()
            raise self.unfit(trouble)
        raise UsageError(
            f"{type(self.model).__name__} takes {', '.join(names)}, for which no example could be made: {trouble}",
            hint=GIVE,
        )

    def unfit(self, trouble: str) -> UsageError:
        """Return the refusal of what the user gave."""
        return UsageError(
            f"{type(self.model).__name__} does not take {', '.join({**self.given, **self.asked})} as given: {trouble}",
            hint=f"it takes {self.described()}",
        )

    def _made(self, names: list[str], made: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not names:
            yield made
            return
        name, *others = names
        if name in self.asked:
            values: Iterator[torch.Tensor | None] = iter([self.shaped(name, self.asked[name])])
        elif name not in MAKERS:
            raise _Unmade(name)
        else:
            values = iter(MAKERS[name](self, made))
        for value in values:
            yield from self._made(others, made if value is None else {**made, name: value})

    def shaped(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return an input of its kind in a shape that the user asked for."""
        if name in _MASKS or name == "input_labels":
            return torch.ones(shape, dtype=torch.long)
        if name.endswith("input_ids"):
            return self.ids(shape)
        if name == "position_ids":
            return torch.arange(shape[-1]).expand(shape).clone()
        if name in _WHOLE:
            return torch.zeros(shape, dtype=torch.long)
        return self.noise(*shape)

    def with_optional(self, given: dict[str, Any]) -> Example:
        """Return the given inputs with a mask, positions and types of tokens, where the model takes them."""
        inputs = dict(given)
        if (
            self.start.complete
            and isinstance(inputs.get("input_ids"), torch.Tensor)
            and inputs["input_ids"].dim() == 2
        ):
            names = self.names()
            for name in _OPTIONAL:
                if name in names and name not in inputs:
                    inputs[name] = next(iter(MAKERS[name](self, inputs)))
        return self.example(inputs)

    def grown(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs with a batch of one repeated, and short texts; sizes of one would be frozen."""
        if any(name in FIXED for name in inputs) or not self.start.grow:
            return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        names = size_names(inputs)
        seen: dict[str, set[int]] = {}
        for name, dims in names.items():
            for dim, size in dims.items():
                seen.setdefault(size, set()).add(inputs[name].shape[dim])

        def enlarged(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            for dim, size in names.get(name, {}).items():
                wide = BATCH if size == "batch" else LENGTH
                few = seen[size] == {1} if size == "batch" else max(seen[size]) < 4 and "sequence" in size
                if few:
                    repeats = [1] * value.dim()
                    repeats[dim] = -(-wide // value.shape[dim])
                    value = value.repeat(*repeats).narrow(dim, 0, wide)
            return value.detach().clone()

        return {name: enlarged(name, value) for name, value in inputs.items()}

    def example(self, inputs: dict[str, Any]) -> Example:
        """Return inputs with those apart whose values decide sizes."""
        inputs, fixed = fixed_inputs(self.model, self.grown(inputs))
        sizes = size_names(inputs)
        if fixed:
            # grids say which rows belong to which image
            sizes = {name: {d: s for d, s in dims.items() if s != "batch"} for name, dims in sizes.items()}
        if self._by_frames(inputs.get("input_features")):
            sizes["input_features"] = {0: "batch"}
        if not self.start.grow:
            # sizes of one do not vary
            sizes = {
                n: {d: s for d, s in dims.items() if inputs[n].shape[d] > 1} for n, dims in sizes.items()
            }
        image = self.token("image")
        marked = (
            int((inputs["input_ids"] == image).sum())
            if fixed and image is not None and "input_ids" in inputs
            else 0
        )
        return Example(inputs, fixed, _told_apart(sizes, inputs), marked)

    def _by_frames(self, value: Any) -> bool:
        """Return whether frames are the last dimension of audio features, and their number the model's."""
        bins = self.setting("num_mel_bins")
        return (
            isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == bins != value.shape[2]
        )

    # -- what they are made of ----------------------------------------------------------------------------

    def setting(self, *names: str, inside: str = "", otherwise: Any = None) -> Any:
        """Return the first setting of these names, in a part of the configuration if it is given and has it."""
        parts = nested(self.config)
        inner = [
            nested(part)
            for n, part in vars(self.config).items()
            if inside and n.startswith(inside) and hasattr(part, "to_dict")
        ]
        for part in [*itertools.chain(*inner), *parts]:
            for name in names:
                value = getattr(part, name, None)
                if value is not None:
                    return value
        return otherwise

    def noise(self, *shape: int) -> torch.Tensor:
        """Return random numbers of this shape."""
        return torch.randn(*shape, generator=self.random)

    def token(self, what: str) -> int | None:
        """Return the id of the token that stands for a part of an image or of audio, if there is one."""
        for name in (f"{what}_token_id", f"{what}_token_index"):
            value = getattr(self.config, name, None)
            if isinstance(value, int) and 0 <= value < int(getattr(self.text, "vocab_size", None) or 0):
                return value
        return None

    def ids(self, shape: torch.Size | tuple[int, ...], of: Any = None) -> torch.Tensor:
        """Return random ids of tokens, without those of a special meaning."""
        vocabulary = int(getattr(of or self.text, "vocab_size", 2) or 2)
        low = min(5, vocabulary - 1)
        ids = torch.randint(low, vocabulary, tuple(shape), generator=torch.Generator().manual_seed(0))
        special = {
            v
            for k, v in vars(self.config).items()
            if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
        }
        special |= {v for v in (self.token(w) for w in ("image", "video", "audio")) if v is not None}
        plain = next((n for n in range(low, vocabulary) if n not in special), low)
        for number in special:
            ids[ids == number] = plain
        return ids

    def image_size(self) -> tuple[int, int]:
        """Return height and width of images: the model's, or those its processor makes."""
        size = self.setting("image_size", "input_size", inside="vision")
        if not isinstance(size, (int, list, tuple)) or not size:
            size = _processor_size(self.processor) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return int(height), int(width)

    def channels(self) -> int:
        """Return the number of channels of images."""
        value = self.setting("num_channels", "in_channels", "in_chans", inside="vision", otherwise=3)
        return int(value) if isinstance(value, int) else 3

    def rope_index(self) -> Callable[..., Any] | None:
        """Return the model's own function from tokens and grids to positions, if it has one."""
        for part in (self.model, getattr(self.model, "model", None)):
            found: Callable[..., Any] | None = getattr(part, "get_rope_index", None)
            if found is not None:
                return found
        return None

    def placeholders(self, made: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return the tokens that a row begins with to stand for what is seen and heard: (id, number)."""
        from .placeholders import features

        found = []
        for what, method in (("image", "get_image_features"), ("audio", "get_audio_features")):
            token = self.token(what)
            if token is None:
                continue
            values = features(self.model, method, made)
            # a number that values decide (how many images are no padding) says nothing yet
            if isinstance(values, int) and values:
                width = int(getattr(self.text, "hidden_size", 1))
                found.append((token, max(1, math.ceil(values / width / self.batch))))
        return found


def _processor_size(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    names = ["crop_size", "size"] if processor.get("do_center_crop", True) else ["size"]
    for name in names:
        size = processor.get(name)
        if isinstance(size, int):
            return size, size
        if isinstance(size, Mapping):
            if "height" in size and "width" in size:
                return int(size["height"]), int(size["width"])
            if "shortest_edge" in size:
                return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _told_apart(sizes: dict[str, dict[int, str]], inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Return names of sizes of which each has one value: a batch of texts may differ from one of images."""
    values: dict[str, list[int]] = {}
    names: dict[str, dict[int, str]] = {}
    for name, dims in sizes.items():
        for dim, size in dims.items():
            known, value = values.setdefault(size, []), int(inputs[name].shape[dim])
            if value not in known:
                known.append(value)
            place = known.index(value)
            names.setdefault(name, {})[dim] = size if not place else f"{size}_{place + 1}"
    return {name: names.get(name, {}) for name in sizes}


def size_names(inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Return which sizes vary and under which name, for inputs of known kinds."""
    names: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or name in FIXED:
            continue
        if name in _SIZES:
            sizes = _SIZES[name].get(value.dim(), ("batch",))
        elif value.dim() == 2 and name.endswith(("_ids", "_mask")) and not value.dtype.is_floating_point:
            sizes = ("batch", "decoder_sequence" if name.startswith("decoder") else "sequence")
        else:
            sizes = ("batch",)
        names[name] = {dim: size for dim, size in enumerate(sizes) if size is not None}
    return names


# what others are made from comes first
_ORDER = (
    "image_grid_thw", "grid_thw", "spatial_shapes", "aspect_ratio_ids", "aspect_ratio_mask", "pixel_values",
    "hidden_states", "pixel_values_videos",
    "image_sizes", "pixel_attention_mask", "pixel_mask", "input_features", "input_values", "past_values",
    "past_time_features", "past_observed_mask", "input_ids", "token_type_ids", "mm_token_type_ids",
    "attention_mask", "position_ids", "decoder_input_ids", "bbox", "input_boxes", "input_points",
)  # fmt: skip
